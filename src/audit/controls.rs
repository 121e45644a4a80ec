//! How far a model moved along the direction, among how far it moved along the controls that the file ships.

use super::{Error, Result};
use crate::activations::Rows;
use crate::controls;
use crate::probe::{Probe, ScoreUnit};
use serde::Serialize;

/// How a family is drawn from a seed.
type Draw = fn(&[f32], u64) -> Vec<f32>;

/// Rows scored at a time.
const BLOCK: usize = 64;

/// What became of one family of controls.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FamilyRank {
    /// The family as the file names it.
    pub family: String,
    /// Controls the file has of it.
    pub controls: usize,
    /// Those along which the model moved at least as far as along the direction; `None` where they were not compared.
    pub as_far: Option<usize>,
    /// The farthest move along one of them, in standard deviations of calm rows; `None` where they were not compared.
    pub farthest: Option<f64>,
    /// (1 + `as_far`) / (1 + `controls`); `None` where they were not compared.
    pub rank_p: Option<f64>,
    /// Why they were not compared.
    pub not_compared: Option<String>,
}

/// The move along the direction and its rank in every family.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ControlRanks {
    /// Mean of the suspect's rows minus mean of the calm ones, along the direction, in standard deviations of the calm rows.
    pub shift: f64,
    /// Calm rows.
    pub calm: u64,
    /// Rows of the suspect.
    pub suspect: u64,
    /// Every family of the file.
    pub families: Vec<FamilyRank>,
}

/// Compares rows of a suspect model with calm rows of the same prompts and site, along the direction of a layer and along
/// each control in the file's evidence that its seed regenerates: the families `random` and `orthogonal`.
///
/// Along each of them the move is the difference of the two means in standard deviations of the calm rows. Finetuning
/// moves a model along most directions, so a large move alone says little; a move along the direction that few controls
/// match says that the model moved *there*. Controls have no sign, so the size of their move counts, while the direction's
/// counts only forwards: the rank p is, if anything, too large. It is reported beside a verdict and never changes it.
///
/// ```
/// use emaudit::audit::ControlBattery;
/// use emaudit::{Probe, Rows};
/// use std::sync::Arc;
///
/// # let directions = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/directions/example.rs"));
/// // `directions` was opened with `Directions::open`; its evidence is untested, so there is nothing to compare with.
/// let probe = Probe::new(Arc::new(directions), 1)?;
/// assert!(ControlBattery::new(&probe).is_err());
/// # Ok::<(), emaudit::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ControlBattery {
    /// The direction first, then the controls of the families in the order of `families`.
    probes: Vec<Probe>,
    /// Family, number of its controls, and whether they are among `probes`.
    families: Vec<(String, usize, bool)>,
    calm: Moments,
    suspect: Moments,
}

/// Running means and sums of squared deviations (Welford), one per probe.
#[derive(Clone, Debug, Default)]
struct Moments {
    rows: u64,
    mean: Vec<f64>,
    squares: Vec<f64>,
}

impl Moments {
    fn push(&mut self, scores: &[f32]) {
        self.rows += 1;
        self.mean.resize(scores.len(), 0.0);
        self.squares.resize(scores.len(), 0.0);
        for ((mean, squares), score) in self.mean.iter_mut().zip(&mut self.squares).zip(scores) {
            let off = f64::from(*score) - *mean;
            *mean += off / self.rows as f64;
            *squares += off * (f64::from(*score) - *mean);
        }
    }

    fn sd(&self, probe: usize) -> f64 {
        (self.squares[probe] / (self.rows - 1) as f64).sqrt()
    }
}

impl ControlBattery {
    /// The controls in the evidence of the probe's file.
    ///
    /// Errors: [`Error::InvalidArgument`] when the probe has no file, the file has no controls, has them for another layer,
    /// or none that a seed alone regenerates.
    pub fn new(probe: &Probe) -> Result<ControlBattery> {
        let refuse = |sentence: String| Error::InvalidArgument(sentence);
        let (directions, layer) = probe
            .directions()
            .zip(probe.layer())
            .ok_or_else(|| refuse("the probe has no direction file".into()))?;
        let evidence = &directions.manifest().evidence;
        match evidence.cell {
            Some(cell) if cell.layer != layer => {
                return Err(refuse(format!("the controls of the file are for layer {}", cell.layer)));
            }
            _ if evidence.families.is_empty() => return Err(refuse("the file has no controls".into())),
            _ => {}
        }
        let found = directions.layer(layer)?;
        let (mut probes, mut families) = (vec![probe.clone()], Vec::new());
        for family in &evidence.families {
            let draw: Option<Draw> = match family.family.as_str() {
                "random" => Some(controls::random),
                "orthogonal" => Some(controls::orthogonal),
                _ => None,
            };
            families.push((family.family.clone(), family.controls.len(), draw.is_some()));
            let Some(draw) = draw else { continue };
            for control in &family.controls {
                let vector = draw(&found.direction, control.seed);
                probes.push(Probe::from_vectors(&vector, &found.aligned_mean, 1.0, Some(probe.kernel()))?);
            }
        }
        if probes.len() == 1 {
            return Err(refuse("a seed alone regenerates none of the controls in the file".into()));
        }
        Ok(ControlBattery { probes, families, calm: Moments::default(), suspect: Moments::default() })
    }

    /// Takes calm rows, one per sequence: the last prompt token's. Rows that are not finite are left out.
    ///
    /// Errors: [`Error::WidthMismatch`].
    pub fn push_calm(&mut self, rows: &Rows<'_>) -> Result<()> {
        score(&self.probes, rows, &mut self.calm)
    }

    /// Takes rows of the suspect, as [`ControlBattery::push_calm`].
    ///
    /// Errors: [`Error::WidthMismatch`].
    pub fn push_suspect(&mut self, rows: &Rows<'_>) -> Result<()> {
        score(&self.probes, rows, &mut self.suspect)
    }

    /// The ranks.
    ///
    /// Errors: [`Error::InvalidArgument`] with fewer than two rows on either side, or calm rows that are all alike.
    pub fn ranks(&self) -> Result<ControlRanks> {
        let (calm, suspect) = (&self.calm, &self.suspect);
        if calm.rows < 2 || suspect.rows < 2 {
            let (calm, suspect) = (calm.rows, suspect.rows);
            let sentence = format!("{calm} calm rows and {suspect} of the suspect; two of each are needed");
            return Err(Error::InvalidArgument(sentence));
        }
        let shift = |probe: usize| (suspect.mean[probe] - calm.mean[probe]) / calm.sd(probe);
        let shifts: Vec<f64> = (0..self.probes.len()).map(shift).collect();
        if !shifts.iter().all(|x| x.is_finite()) {
            return Err(Error::InvalidArgument("the calm rows do not vary along every direction".into()));
        }
        let mut left = &shifts[1..];
        let families = self.families.iter().map(|(family, controls, regenerated)| {
            let (of_family, others) = left.split_at(if *regenerated { *controls } else { 0 });
            left = others;
            rank(family, *controls, shifts[0], regenerated.then_some(of_family))
        });
        Ok(ControlRanks {
            shift: shifts[0],
            calm: calm.rows,
            suspect: suspect.rows,
            families: families.collect(),
        })
    }
}

fn rank(family: &str, controls: usize, shift: f64, moves: Option<&[f64]>) -> FamilyRank {
    let as_far = moves.map(|moves| moves.iter().filter(|x| x.abs() >= shift).count());
    FamilyRank {
        family: family.to_owned(),
        controls,
        as_far,
        farthest: moves.map(|moves| moves.iter().fold(0.0, |most, x| f64::max(most, x.abs()))),
        rank_p: as_far.map(|n| (1 + n) as f64 / (1 + controls) as f64),
        not_compared: moves.is_none().then(|| "its seeds need rows that the file does not hold".into()),
    }
}

fn score(probes: &[Probe], rows: &Rows<'_>, moments: &mut Moments) -> Result<()> {
    let mut scores = vec![0.0; BLOCK.min(rows.rows()) * probes.len()];
    let mut begin = 0;
    while begin < rows.rows() {
        let some = rows.part(begin, BLOCK.min(rows.rows() - begin));
        let scores = &mut scores[..some.rows() * probes.len()];
        match Probe::score_all(probes, &some, ScoreUnit::Raw, scores, None) {
            Ok(()) | Err(Error::NonFinite { .. }) => {}
            Err(error) => return Err(error),
        }
        for of_row in scores.chunks_exact(probes.len()) {
            if of_row.iter().all(|score| score.is_finite()) {
                moments.push(of_row);
            }
        }
        begin += some.rows();
    }
    Ok(())
}
