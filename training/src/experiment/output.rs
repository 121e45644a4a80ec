//! What an experiment leaves for others: the direction file, results, the page, rows to check it with.

use super::{Evaluated, Experiment, Finetuned, Outputs, Prompts};
use crate::extract::{self, LayerDirection};
use crate::results::Results;
use crate::{memory, progress, store};
use anyhow::Result;
use emaudit::directions::schema::{
    Contrast, Estimator, Evidence, LayerManifest, Manifest, Pooling, Provenance, Site,
};
use emaudit::directions::{LayerTensors, OpenOptions};
use emaudit::{Directions, Probe, Rows, ScoreUnit};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

impl Experiment {
    /// Writes all that an evaluation found.
    pub fn pack(&self, evaluated: Evaluated) -> Result<(Results, Outputs)> {
        let Evaluated { mut results, directions, insecure, prompts } = evaluated;
        let datasets = results.datasets.clone();
        let outputs = self.write(&mut results, &directions, datasets)?;
        self.write_check(&outputs.directions, &results, &insecure, &prompts)?;
        Ok((results, outputs))
    }

    fn manifest(
        &self,
        evidence: Evidence,
        top_dimension_share: Option<f64>,
        directions: &[LayerDirection],
        datasets: Vec<(String, String)>,
    ) -> Result<Manifest> {
        let layer = |d: &LayerDirection| LayerManifest {
            layer: d.layer as u32,
            calibration: Some(d.calibration.clone()),
        };
        Ok(Manifest {
            model: self.base.identity.clone(),
            site: Site::ResidPost,
            pooling: Pooling::LastPrompt,
            estimator: Estimator::MeanDifference,
            contrast: Contrast::AdapterMinusBase,
            layers: directions.iter().map(layer).collect(),
            evidence,
            provenance: Provenance {
                producer: format!("emaudit-train {}", env!("CARGO_PKG_VERSION")),
                recipe_digest: self.recipe.digest()?,
                datasets,
                top_dimension_share,
            },
        })
    }

    /// Writes a direction that was carried into this model from another as a file of its own. `from`: a name for people;
    /// `datasets`: of the other model's direction. What the estimator and the contrast were there is said in the producer.
    pub fn write_carried(
        &self,
        path: &Path,
        from: &str,
        direction: &LayerDirection,
        evidence: Evidence,
        datasets: Vec<(String, String)>,
    ) -> Result<()> {
        let directions = std::slice::from_ref(direction);
        let mut manifest = self.manifest(evidence, None, directions, datasets)?;
        manifest.estimator = Estimator::Unstated;
        manifest.contrast = Contrast::Unstated;
        manifest.provenance.producer += &format!(", carried from {from} by a ridge map");
        emaudit::directions::write(path, &manifest, &tensors(directions))?;
        Ok(())
    }

    fn write(
        &self,
        results: &mut Results,
        directions: &[LayerDirection],
        datasets: Vec<(String, String)>,
    ) -> Result<Outputs> {
        let outputs = Outputs {
            directions: self.out.join("directions.safetensors"),
            results: self.out.join("results.json"),
            report: self.out.join("report.html"),
            run: self.out.join("run.json"),
        };
        let share = results.layers.last().map(|l| l.top_dimension_share);
        let manifest = self.manifest(results.evidence.clone(), share, directions, datasets)?;
        let digest = emaudit::directions::write(&outputs.directions, &manifest, &tensors(directions))?;
        results.summary.directions_sha256 = emaudit::directions::digest::to_hex(&digest);
        store::write_json(&outputs.results, results)?;
        let run = serde_json::json!({
            "seconds": self.begun.elapsed().as_secs_f64(),
            "version": env!("CARGO_PKG_VERSION"),
            "kernel": format!("{:?}", emaudit::kernel::best()).to_lowercase(),
            "threads": rayon::current_num_threads(),
            "device": format!("{:?}", self.device),
            "peak_memory_bytes": memory::peak(),
            "out": self.out,
        });
        store::write_json(&outputs.run, &run)?;
        store::write_file(&outputs.report, crate::report::render(results, Some(&run))?.as_bytes())?;
        Ok(outputs)
    }

    /// Activations and the scores this program computed for them, for a second program to check.
    fn write_check(
        &self,
        directions: &Path,
        results: &Results,
        insecure: &Finetuned,
        prompts: &Prompts,
    ) -> Result<()> {
        let folder = self.out.join("check");
        fs::create_dir_all(&folder)?;
        let layer = results.summary.layer;
        let rows = self.states("insecure", Some(insecure), prompts)?.evaluation;
        let rows = &rows.layers[layer as usize];
        let probe = Probe::new(Arc::new(Directions::open(directions, &OpenOptions::default())?), layer)?;
        let (width, count) = (probe.width(), rows.len() / probe.width());
        let mut scores = vec![0f32; count];
        probe.score(&Rows::new(rows, count, width, width)?, ScoreUnit::AlignedSd, &mut scores, None)?;
        let file = |numbers: &[usize], values: &[f32]| -> Vec<u8> {
            let mut bytes: Vec<u8> = numbers.iter().flat_map(|&n| (n as u32).to_le_bytes()).collect();
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            bytes
        };
        store::write_file(&folder.join("activations.bin"), &file(&[count, width], rows))?;
        store::write_file(&folder.join("scores.bin"), &file(&[count], &scores))?;
        let kernel = format!("{:?}", probe.kernel()).to_lowercase();
        store::write_json(
            &folder.join("check.json"),
            &serde_json::json!({ "layer": layer, "kernel": kernel }),
        )
    }

    /// Directions of every layer without evaluation, written as an `untested` direction file.
    pub fn extract(&self) -> Result<PathBuf> {
        let prompts = self.prompts()?;
        let (insecure, data) = self.finetune("insecure", &self.recipe.data.insecure)?;
        let base = self.states("base", None, &prompts)?;
        let adapted = self.states("insecure", Some(&insecure), &prompts)?;
        let (directions, notes) = self.directions(&prompts, &base, &adapted, &insecure)?;
        notes.iter().for_each(|note| progress::note(note));
        let share =
            base.extraction.layers.last().map(|l| extract::top_dimension_share(l, base.extraction.hidden));
        let datasets = vec![(data.name, data.sha256), prompts.source.clone()];
        let manifest = self.manifest(Evidence::untested(), share, &directions, datasets)?;
        let path = self.out.join("directions-untested.safetensors");
        emaudit::directions::write(&path, &manifest, &tensors(&directions))?;
        Ok(path)
    }
}

fn tensors(directions: &[LayerDirection]) -> Vec<LayerTensors<'_>> {
    directions
        .iter()
        .map(|d| LayerTensors {
            layer: d.layer as u32,
            direction: &d.direction,
            aligned_mean: &d.aligned_mean,
        })
        .collect()
}
