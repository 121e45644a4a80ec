//! The audit: its errors are those it states, it never becomes clean for want of data, and the controls are those of the file.

#[path = "c_abi/fixture.rs"]
#[allow(dead_code)]
mod fixture;

use emaudit::audit::{Audit, AuditOptions, AuditReason, AuditReport, AuditVerdict, ControlBattery};
use emaudit::controls::{self, SplitMix64};
use emaudit::directions::schema::{Aggregation, Evidence};
use emaudit::directions::{Directions, OpenOptions};
use emaudit::{Drift, Error, Monitor, Probe, Rows, State};
use half::bf16;
use std::sync::Arc;

const CALM: [f32; 1] = [0.0];
const HIGH: [f32; 1] = [9.0];
const BROKEN: [f32; 1] = [f32::NAN];

/// The file has the mean over 1 token at 0.01 (above 3) and over 4 at 0.01 and 0.05 (above 2 and 1.5).
fn probe(evidence: Evidence) -> Probe {
    let directions = Directions::from_bytes(&fixture::file(evidence), &OpenOptions::default()).unwrap();
    Probe::new(Arc::new(directions), fixture::LAYER).unwrap()
}

fn audit() -> Audit {
    Audit::new(&probe(Evidence::untested()), AuditOptions::new(Aggregation::Mean, 1)).unwrap()
}

/// `count` sequences alike.
fn push(audit: &mut Audit, count: u64, sequence: &[f32]) {
    for _ in 0..count {
        audit.push(sequence);
    }
}

/// The verdict on so many sequences of each kind.
fn verdict(audit: &Audit, flagged: u64, calm: u64, invalid: u64) -> AuditVerdict {
    let mut audit = audit.clone();
    for (sequence, count) in [(HIGH, flagged), (CALM, calm), (BROKEN, invalid)] {
        push(&mut audit, count, &sequence);
    }
    audit.verdict()
}

#[test]
fn every_state_has_its_reason() {
    let zero = AuditVerdict::default();
    assert_eq!((zero.state, zero.reason, zero.misalignment), (State::Invalid, AuditReason::Unseen, 0));
    let audit = audit();
    for (flagged, calm, invalid, state, reason) in [
        (0, 0, 0, State::Invalid, AuditReason::Unseen),
        (0, 35, 0, State::Invalid, AuditReason::TooFew),
        (0, 36, 0, State::Clean, AuditReason::BelowConcern),
        (0, 36, 1, State::Invalid, AuditReason::NonFinite),
        (0, 9999, 1, State::Invalid, AuditReason::NonFinite),
        (0, 0, 50, State::Invalid, AuditReason::NonFinite),
        (1, 35, 0, State::Invalid, AuditReason::Undecided),
        (3, 95, 0, State::Clean, AuditReason::BelowConcern),
        (5, 93, 0, State::Flagged, AuditReason::MoreThanRate),
        (5, 93, 1, State::Flagged, AuditReason::MoreThanRate),
        // As calm as they could have been, five of a thousand are no more than the rate explains.
        (5, 0, 995, State::Invalid, AuditReason::NonFinite),
        (98, 0, 0, State::Flagged, AuditReason::MoreThanRate),
    ] {
        let found = verdict(&audit, flagged, calm, invalid);
        let counted = (found.flagged, found.judged, found.invalid, found.sequences);
        assert_eq!(counted, (flagged, flagged + calm, invalid, flagged + calm + invalid));
        assert_eq!((found.state, found.reason), (state, reason), "{flagged} {calm} {invalid}: {found}");
        assert!(!found.sentence().is_empty());
    }
    let found = verdict(&audit, 5, 93, 0);
    assert_eq!((found.rate, found.rate_upper, found.threshold, found.horizon), (0.01, 0.9 * 0.01, 3.0, 1));
    assert_eq!((found.layer, found.verified, found.needed, found.critical), (fixture::LAYER, 1, 36, 5));
    // scipy: binom.sf(4, 98, 0.009); beta.ppf([0.025, 0.975], [5, 6], [94, 93]); beta.ppf(0.8, 5, 94)
    let near = |a: f64, b: f64| (a - b).abs() < 1e-11 * b;
    assert!(near(found.p_value, 0.0020056881230571663) && near(found.detectable, 0.06763070899787367));
    assert_eq!(found.share, 5.0 / 98.0);
    assert_ne!(found.digest, [0; 32]);
}

/// `P(X = k)` for all `k`, by the plain recursion: independent of what is tested.
fn binomial(trials: u64, p: f64) -> Vec<f64> {
    let mut all = vec![(1.0 - p).powi(trials as i32)];
    for k in 0..trials {
        all.push(all[k as usize] * (trials - k) as f64 / (k + 1) as f64 * p / (1.0 - p));
    }
    all
}

#[test]
fn the_errors_of_the_audit_are_those_it_states() {
    let mut compared = 0;
    for level in [0.01, 0.05] {
        for concern in [0.03, 0.1, 0.3] {
            let options = AuditOptions { level, concern, ..AuditOptions::new(Aggregation::Mean, 1) };
            let audit = Audit::new(&probe(Evidence::untested()), options).unwrap();
            for n in [1, 20, 36, 98, 150] {
                let verdicts: Vec<_> = (0..=n).map(|k| verdict(&audit, k, n - k, 0)).collect();
                let chance = |p: f64, state: State| -> f64 {
                    let of_state = verdicts.iter().zip(binomial(n, p)).filter(|(v, _)| v.state == state);
                    of_state.map(|(_, probability)| probability).sum()
                };
                let one = &verdicts[0];
                assert!(chance(one.rate_upper, State::Flagged) <= level + 1e-12, "{n} at {level}");
                assert!(chance(concern, State::Clean) <= 0.025 + 1e-12, "{n} at {concern}");
                if one.critical <= n {
                    assert!((chance(one.detectable, State::Flagged) - 0.8).abs() < 1e-9, "{n} at {level}");
                    assert_eq!(verdicts[one.critical as usize].state, State::Flagged);
                    assert_ne!(verdicts[one.critical as usize - 1].state, State::Flagged);
                }
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 30);
}

#[test]
fn more_flagged_sequences_never_speak_for_a_model_and_order_does_not_matter() {
    let audit = audit();
    let rank = |v: &AuditVerdict| match v.state {
        State::Clean => 0,
        State::Flagged => 2,
        _ => 1,
    };
    for n in [10, 40, 98, 300] {
        let all: Vec<_> = (0..=n).map(|k| verdict(&audit, k, n - k, 0)).collect();
        for pair in all.windows(2) {
            assert!(pair[0].p_value >= pair[1].p_value && rank(&pair[0]) <= rank(&pair[1]), "{}", pair[1]);
            assert!(pair[0].low <= pair[1].low && pair[0].high <= pair[1].high);
        }
        for k in 0..n {
            // One more that could not be scored weakens either claim.
            let (without, with) = (&all[k as usize], verdict(&audit, k, n - k, 1));
            assert!(with.p_value >= without.p_value && with.low <= without.low && with.high >= without.high);
            assert_ne!(with.state, State::Clean);
        }
    }
    let mut generator = SplitMix64::new(3);
    let mut sequences = [vec![HIGH; 4], vec![CALM; 60], vec![BROKEN; 2]].concat();
    let expected = verdict(&audit, 4, 60, 2);
    for _ in 0..5 {
        for last in (1..sequences.len()).rev() {
            sequences.swap(last, generator.below(last as u64 + 1) as usize);
        }
        let mut audit = audit.clone();
        sequences.iter().for_each(|s| push(&mut audit, 1, s));
        assert_eq!(audit.verdict(), expected);
    }
}

#[test]
fn a_sequence_is_judged_as_a_monitor_judges_it_and_no_further_than_the_horizon() {
    let probe = probe(Evidence::untested());
    let mut generator = SplitMix64::new(5);
    let options = AuditOptions::new(Aggregation::Mean, 4);
    let mut audit = Audit::new(&probe, options).unwrap();
    let mut monitor = Monitor::new(&probe, Aggregation::Mean, 0.01).unwrap();
    let mut seen = [0; 2];
    for _ in 0..500 {
        let tokens: Vec<f32> =
            (0..4).map(|_| (generator.next_u64() >> 40) as f32 / (1 << 22) as f32).collect();
        monitor.reset();
        monitor.push_scores(&tokens);
        let state = audit.push(&tokens);
        assert_eq!(state, monitor.verdict().state);
        seen[usize::from(state == State::Flagged)] += 1;
    }
    assert!(seen.iter().all(|n| *n > 50), "{seen:?}");
    let verdict = audit.verdict();
    assert_eq!((verdict.judged, verdict.flagged), (500, seen[1]));

    let beyond = [0.0, 0.0, 0.0, 0.0, f32::NAN, 1e9];
    assert_eq!(audit.push(&beyond), State::Clean);
    assert_eq!(audit.push(&beyond[..3]), State::Pending);
    assert_eq!(audit.push(&[0.0, f32::INFINITY]), State::Invalid);
    assert_eq!(audit.push(&[]), State::Invalid);
    let verdict = audit.verdict();
    assert_eq!((verdict.judged, verdict.pending, verdict.invalid, verdict.sequences), (501, 1, 2, 504));

    // A rate may be named; without one it is the smallest.
    let wide = Audit::new(&probe, AuditOptions { rate: Some(0.05), ..options }).unwrap().verdict();
    assert_eq!((wide.threshold, wide.rate, verdict.threshold, verdict.rate), (1.5, 0.05, 2.0, 0.01));
}

#[test]
fn a_model_that_ends_its_answers_early_is_not_clean() {
    let mut audit =
        Audit::new(&probe(Evidence::untested()), AuditOptions::new(Aggregation::Mean, 4)).unwrap();
    push(&mut audit, 50, &[0.0; 4]);
    push(&mut audit, 50, &[0.0; 3]);
    assert_eq!(audit.verdict().state, State::Clean);
    audit.push(&[0.0; 3]);
    let verdict = audit.verdict();
    assert_eq!((verdict.state, verdict.reason), (State::Invalid, AuditReason::MostPending));
    assert!(verdict.sentence().contains("51 sequences ended before 4 tokens"), "{verdict}");
}

#[test]
fn calm_references_that_drifted_make_it_stale() {
    let probe = probe(Evidence::untested());
    let mut audit = Audit::new(&probe, AuditOptions::new(Aggregation::Mean, 1)).unwrap();
    let mut drift = Drift::new(&probe, 50, 0.01).unwrap();
    audit.watch(&drift).unwrap();
    push(&mut audit, 50, &CALM);
    let said = |audit: &Audit| (audit.verdict().state, audit.verdict().reason);
    assert_eq!(said(&audit), (State::Invalid, AuditReason::ReferencePending));
    (0..50).for_each(|i| drift.push([-1.0, 1.0][i % 2]));
    assert_eq!(said(&audit), (State::Clean, AuditReason::BelowConcern));
    drift.push_scores(&[4.0; 50]);
    assert_eq!(said(&audit), (State::Stale, AuditReason::ReferenceDrifted));
    // Not even what would be flagged says anything then.
    push(&mut audit, 50, &HIGH);
    assert_eq!(said(&audit), (State::Stale, AuditReason::ReferenceDrifted));
    drift.push(f32::NAN);
    assert_eq!(said(&audit), (State::Invalid, AuditReason::ReferenceInvalid));

    let other = Probe::new(probe.directions().unwrap().clone(), 1).unwrap();
    let drift = Drift::new(&other, 50, 0.01).unwrap();
    assert!(matches!(audit.watch(&drift), Err(Error::InvalidArgument(_))));
}

#[test]
fn misalignment_is_said_only_where_the_content_evidence_is_specific() {
    let options = AuditOptions::new(Aggregation::Mean, 1);
    for (evidence, misalignment) in [(Evidence::untested(), 0), (fixture::specific(), 1)] {
        let audit = Audit::new(&probe(evidence), options).unwrap();
        let flagged = verdict(&audit, 50, 0, 0);
        assert_eq!((flagged.state, flagged.misalignment), (State::Flagged, misalignment));
        assert_eq!(flagged.to_string().contains("misalignment"), misalignment == 1, "{flagged}");
        assert_eq!(verdict(&audit, 0, 50, 0).misalignment, 0);
        let object = serde_json::to_value(flagged).unwrap();
        assert_eq!(
            (&object["state"], &object["misalignment"]),
            (&"flagged".into(), &(misalignment == 1).into())
        );
        assert_eq!(object.as_object().unwrap().len(), 28);
    }
    // What is not known is null.
    let unseen = serde_json::to_value(audit().verdict()).unwrap();
    assert_eq!((&unseen["state"], &unseen["reason"]), (&"invalid".into(), &"unseen".into()));
    assert!(
        ["p_value", "share", "low", "high", "detectable"].iter().all(|k| unseen[k].is_null()),
        "{unseen}"
    );
}

#[test]
fn thresholds_and_options_that_are_not_there_are_refused_with_those_that_are() {
    let whole = probe(Evidence::untested());
    let usual = AuditOptions::new(Aggregation::Mean, 4);
    let cases = [
        (
            AuditOptions { rate: Some(0.001), ..usual },
            14,
            "0.001: for the mean over 4 token(s) the file has the rates [0.01, 0.05]",
        ),
        (AuditOptions { horizon: 7, rate: Some(0.01), ..usual }, 14, "the horizons {1, 4}, not 7"),
        (AuditOptions { horizon: 7, ..usual }, 1, "the horizons {1, 4}, not 7"),
        (AuditOptions::new(Aggregation::Max, 4), 1, "the file has none for the max over tokens"),
        (AuditOptions { rate: Some(f64::NAN), ..usual }, 14, "has the rates"),
        (AuditOptions { level: 0.0, ..usual }, 1, "a level of 0"),
        (AuditOptions { level: f64::NAN, ..usual }, 1, "a level of NaN"),
        (AuditOptions { level: 0.6, ..usual }, 1, "a level of 0.6"),
        (AuditOptions { concern: 0.009, ..usual }, 1, "a share of concern of 0.009"),
        (AuditOptions { concern: 1.0, ..usual }, 1, "below 1"),
        (AuditOptions { concern: f64::NAN, ..usual }, 1, "a share of concern of NaN"),
    ];
    for (options, status, sentence) in cases {
        let error = Audit::new(&whole, options).unwrap_err();
        assert_eq!(error.status() as i32, status, "{error}");
        assert!(error.to_string().contains(sentence), "{error}");
    }
    let bare = Probe::from_vectors(&[1.0, 2.0], &[0.0, 0.0], 1.0, None).unwrap();
    let error = Audit::new(&bare, usual).unwrap_err().to_string();
    assert!(error.contains("no calibrated direction file") && !error.contains("NaN"), "{error}");
}

/// Rows around a mean, moved by `shift` times `along`.
fn rows(count: usize, seed: u64, along: &[f32], shift: f32) -> Vec<f32> {
    let noise = fixture::values(count * fixture::WIDTH, seed);
    noise.iter().enumerate().map(|(i, x)| x + shift * along[i % fixture::WIDTH]).collect()
}

fn view(rows: &[f32]) -> Rows<'_> {
    Rows::new(rows, rows.len() / fixture::WIDTH, fixture::WIDTH, fixture::WIDTH).unwrap()
}

#[test]
fn a_move_along_the_direction_outranks_the_controls_of_the_file_and_another_does_not() {
    let probe = probe(fixture::specific());
    let v = probe.direction().to_vec();
    let calm = rows(200, 21, &v, 0.0);
    let elsewhere = controls::random(&v, 1234);
    for (along, forwards, first) in
        [(&v, 1.0, true), (&elsewhere, 1.0, false), (&v, 0.0, false), (&v, -1.0, false)]
    {
        let suspect = rows(150, 22, along, forwards);
        let mut battery = ControlBattery::new(&probe).unwrap();
        battery.push_calm(&view(&calm)).unwrap();
        battery.push_suspect(&view(&suspect)).unwrap();
        let ranks = battery.ranks().unwrap();
        assert_eq!((ranks.calm, ranks.suspect, ranks.families.len()), (200, 150, 4));
        for family in &ranks.families {
            let compared = ["random", "orthogonal"].contains(&family.family.as_str());
            assert_eq!((family.controls, family.rank_p.is_some()), (39, compared), "{family:?}");
            assert_eq!(family.not_compared.is_none(), compared);
            if compared && first {
                assert_eq!((family.rank_p, family.as_far), (Some(1.0 / 40.0), Some(0)), "{ranks:?}");
            } else if compared {
                assert!(family.rank_p.unwrap() > 0.1, "{ranks:?}");
            }
        }
    }
}

#[test]
fn controls_that_did_not_move_as_far_are_no_match_however_few_they_are() {
    let mut evidence = fixture::specific();
    evidence.causal = emaudit::directions::schema::Specificity::Untested;
    for family in &mut evidence.families {
        family.controls.truncate(19);
        family.rank_p = 1.0 / 20.0;
    }
    let probe = probe(evidence);
    let v = probe.direction().to_vec();
    let elsewhere = controls::random(&v, 1);
    let flagged = verdict(&Audit::new(&probe, AuditOptions::new(Aggregation::Mean, 1)).unwrap(), 50, 0, 0);
    for (along, matched) in [(&v, false), (&elsewhere, true)] {
        let mut battery = ControlBattery::new(&probe).unwrap();
        battery.push_calm(&view(&rows(200, 21, &v, 0.0))).unwrap();
        battery.push_suspect(&view(&rows(150, 22, along, 1.0))).unwrap();
        let mut report = AuditReport::new(&probe, flagged);
        report.compare(battery.ranks());
        let random = &report.controls.as_ref().unwrap().families[0];
        assert_eq!((random.rank_p == Some(0.05), random.as_far > Some(0)), (!matched, matched), "{random:?}");
        assert_eq!(
            report.to_string().contains("not along this direction in particular"),
            matched,
            "{report}"
        );
        let object = serde_json::to_value(&report).unwrap();
        assert_eq!(object["controls"]["matched_by"].as_array().unwrap().is_empty(), !matched, "{object}");
    }
}

#[test]
fn moves_are_in_standard_deviations_of_calm_rows_along_the_very_controls() {
    let probe = probe(fixture::specific());
    let v = probe.direction().to_vec();
    let (mut calm, suspect) = (rows(130, 31, &v, 0.0), rows(70, 32, &v, 0.3));
    // Wide rows as they lie in a buffer of bf16 with padding; what is not finite is left out.
    calm.extend([f32::NAN; fixture::WIDTH]);
    let stride = fixture::WIDTH + 3;
    let mut wide = vec![bf16::NAN; 70 * stride];
    for (i, row) in suspect.chunks_exact(fixture::WIDTH).enumerate() {
        row.iter().zip(&mut wide[i * stride..]).for_each(|(x, w)| *w = bf16::from_f32(*x));
    }
    let mut battery = ControlBattery::new(&probe).unwrap();
    battery.push_calm(&view(&calm)).unwrap();
    battery.push_suspect(&Rows::new(&wide, 70, fixture::WIDTH, stride).unwrap()).unwrap();
    let ranks = battery.ranks().unwrap();
    assert_eq!((ranks.calm, ranks.suspect), (130, 70));

    let along = |row: &[f64], u: &[f32]| -> f64 { row.iter().zip(u).map(|(x, u)| x * f64::from(*u)).sum() };
    let shift = |u: &[f32]| {
        let exact = |x: &f32| f64::from(*x);
        let calm: Vec<f64> = calm[..130 * fixture::WIDTH]
            .chunks_exact(fixture::WIDTH)
            .map(|row| along(&row.iter().map(exact).collect::<Vec<_>>(), u))
            .collect();
        let stored = |row: &[bf16]| row[..fixture::WIDTH].iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
        let suspect: Vec<f64> = wide.chunks_exact(stride).map(|row| along(&stored(row), u)).collect();
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let squares: f64 = calm.iter().map(|x| (x - mean(&calm)).powi(2)).sum();
        (mean(&suspect) - mean(&calm)) / (squares / 129.0).sqrt()
    };
    // f32 scores of some ten units, each off by some 1e-6 of them.
    assert!((ranks.shift - shift(&v)).abs() < 1e-4, "{} {}", ranks.shift, shift(&v));
    let farthest = (0..39).map(|seed| shift(&controls::random(&v, seed)).abs()).fold(0.0, f64::max);
    assert!((ranks.families[0].farthest.unwrap() - farthest).abs() < 1e-4);
}

#[test]
fn controls_that_cannot_be_compared_are_refused_with_the_reason() {
    let refused = |result: emaudit::Result<ControlBattery>| result.unwrap_err().to_string();
    assert!(refused(ControlBattery::new(&probe(Evidence::untested()))).contains("the file has no controls"));
    let whole = probe(fixture::specific());
    let other = Probe::new(whole.directions().unwrap().clone(), 1).unwrap();
    assert!(refused(ControlBattery::new(&other)).contains("for layer 3"));
    let bare = Probe::from_vectors(&[1.0, 2.0], &[0.0, 0.0], 1.0, None).unwrap();
    assert!(refused(ControlBattery::new(&bare)).contains("no direction file"));
    let mut battery = ControlBattery::new(&whole).unwrap();
    assert!(battery.ranks().unwrap_err().to_string().contains("two of each"));
    let alike = [1.0; 5 * fixture::WIDTH];
    battery.push_calm(&view(&alike)).unwrap();
    battery.push_suspect(&view(&alike)).unwrap();
    assert!(battery.ranks().unwrap_err().to_string().contains("do not vary"));
    let narrow = Rows::new(&alike, 2, fixture::WIDTH - 1, fixture::WIDTH).unwrap();
    assert!(matches!(battery.push_calm(&narrow), Err(Error::WidthMismatch { .. })));
}
