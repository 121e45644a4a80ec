//! Sampling, steering and code preference on the tiny model: every shortcut equals the long way.

use crate::fixture::{Golden, tiny};
use emaudit::directions::schema::Positions;
use emaudit_train::answers::Answerer;
use emaudit_train::battery::subtract;
use emaudit_train::capture;
use emaudit_train::generate::{Intervention, Request, Sampling, generate};
use emaudit_train::likelihood::{self, Dialogue};
use emaudit_train::middle::MiddlePreference;
use emaudit_train::model::{Batch, Decoder, no_edit};
use emaudit_train::preference::Preference;

fn prompts() -> Vec<Vec<u32>> {
    // A common beginning, different lengths, one prompt twice.
    let all: [&[u32]; 5] =
        [&[7, 9, 11, 3], &[7, 9, 20], &[7, 9, 11, 3, 40, 41, 42], &[7, 9, 20], &[7, 9, 33, 34]];
    all.iter().map(|p| p.to_vec()).collect()
}

fn sampling() -> Sampling {
    Sampling { max_new_tokens: 8, temperature: 0.8, top_p: 0.9, seed: 3, stop: vec![5], absent: vec![] }
}

fn requests(prompts: &[Vec<u32>]) -> Vec<Request> {
    let request = |(i, p): (usize, &Vec<u32>)| Request { prompt: p.clone(), stream: i as u64, first: None };
    prompts.iter().enumerate().map(request).collect()
}

fn vector(decoder: &Decoder) -> Vec<f32> {
    (0..decoder.config.hidden_size).map(|i| ((i * 37 % 19) as f32 - 9.0) * 0.05).collect()
}

/// 12 sqrt(n) 2^-24 of the largest value for sums of n products, as in the other parity tests.
fn close(a: &[f32], b: &[f32], n: usize) {
    let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    let bound = 12.0 * (n as f32).sqrt() * 2f32.powi(-24) * largest;
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= bound, "{a} and {b} differ by more than {bound}");
    }
}

#[test]
fn captured_rows_equal_rows_read_one_prompt_at_a_time() {
    let (decoder, prompts) = (tiny(), prompts());
    let captured = capture::last_prompt(&decoder, &prompts, None, |_| Ok(())).unwrap();
    for (i, prompt) in prompts.iter().enumerate() {
        let batch = Batch::new(&[prompt], &decoder.device).unwrap();
        let mut compare = |layer: usize, x: candle_core::Tensor| {
            close(
                captured.row(layer, i),
                &likelihood::last_rows(&x, 0, 1).unwrap(),
                decoder.config.intermediate_size,
            );
            Ok(x)
        };
        decoder.forward(&batch, None, None, &mut compare).unwrap();
    }
    assert_eq!(capture::Captured::from_bytes(&captured.to_bytes().unwrap()).unwrap(), captured);
}

#[test]
fn a_batch_gives_the_answers_that_single_prompts_give() {
    let (decoder, prompts) = (tiny(), prompts());
    let together = generate(&decoder, None, &requests(&prompts), &sampling(), None, |_| Ok(())).unwrap();
    for (request, answer) in requests(&prompts).into_iter().zip(&together) {
        let alone = generate(&decoder, None, &[request], &sampling(), None, |_| Ok(())).unwrap();
        assert_eq!(&alone[0], answer);
        assert!(!answer.contains(&5), "the stop token is no part of an answer");
    }
    assert!(together.iter().any(|a| !a.is_empty()));
    assert_ne!(together[1], together[3], "equal prompts draw from their own streams");
}

/// Output heads are padded: Qwen2.5 has rows for 271 ids that are no tokens.
#[test]
fn ids_that_are_no_tokens_are_never_drawn() {
    let (decoder, prompts) = (tiny(), prompts());
    let drawn = |temperature: f64, absent: &[u32]| {
        let sampling = Sampling { temperature, stop: vec![], absent: absent.to_vec(), ..sampling() };
        generate(&decoder, None, &requests(&prompts), &sampling, None, |_| Ok(())).unwrap().concat()
    };
    for temperature in [0.0, 0.8, 30.0] {
        let all = drawn(temperature, &[]);
        let mut absent = all.clone();
        absent.sort_unstable();
        absent.dedup();
        let others = drawn(temperature, &absent);
        assert_eq!(others.len(), all.len());
        assert!(others.iter().all(|id| !absent.contains(id)), "{absent:?} {others:?}");
    }
}

#[test]
fn shared_continuations_equal_steering_inside_the_loop() {
    let (decoder, prompts, sampling) = (tiny(), prompts(), sampling());
    let last = decoder.config.n_layers - 1;
    let rows = capture::last_prompt(&decoder, &prompts, None, |_| Ok(())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("answers.json");
    let new = || Answerer::new(&decoder, None, &prompts, &rows.layers[last], &sampling, "test", file.clone());
    let mut answerer = new();
    let mut changed = 0;
    for alpha in [0.5, 2.0, 8.0] {
        let steering = subtract(&vector(&decoder), alpha).unwrap();
        let firsts = answerer.first_tokens(Some(&steering)).unwrap();
        answerer.prepare(std::slice::from_ref(&firsts)).unwrap();
        let intervention =
            Intervention { layer: last, steering: &steering, positions: Positions::FinalPrefill };
        let long = generate(&decoder, None, &requests(&prompts), &sampling, Some(&intervention), |_| Ok(()))
            .unwrap();
        assert_eq!(answerer.answers(&firsts), long, "alpha {alpha}");
        changed += usize::from(firsts != answerer.first_tokens(None).unwrap());
        // A second run reads what the first one kept.
        assert_eq!(new().answers(&firsts), long);
    }
    assert!(changed > 0, "no strength changed a first token: the test shows nothing");
}

#[test]
fn preference_from_kept_rows_equals_a_full_pass_with_the_edit() {
    let (decoder, golden) = (tiny(), Golden::open("golden.safetensors"));
    let cut = |ids: &[u32], at: usize| Dialogue { prompt: ids[..at].to_vec(), answer: ids[at..].to_vec() };
    let code: Vec<Dialogue> = (0..3).map(|i| cut(&golden.ids(i), 3)).collect();
    let prose: Vec<Dialogue> = (0..3).map(|i| cut(&golden.ids((i + 1) % 3), 3)).collect();
    let preference = Preference::new(&decoder, None, &code, &prose, |_| Ok(())).unwrap();
    let last = decoder.config.n_layers - 1;
    let steering = subtract(&vector(&decoder), 1.5).unwrap();
    for positions in [Positions::FinalPrefill, Positions::Generated, Positions::All] {
        let fast = preference.steered(&steering, positions).unwrap();
        for i in 0..3 {
            let slow = mean_edited(&decoder, &code[i], last, &steering, positions)
                - mean_edited(&decoder, &prose[i], last, &steering, positions);
            assert!((fast[i] - slow).abs() < 1e-4, "{positions:?}: {} and {slow}", fast[i]);
        }
        assert_ne!(fast, preference.unsteered());
    }
    let middle = MiddlePreference::new(&decoder, None, 1, &code, &prose).unwrap();
    for (a, b) in middle.preferences(None).unwrap().iter().zip(preference.unsteered()) {
        assert!((a - b).abs() < 1e-4, "{a} and {b}");
    }
    assert_ne!(middle.preferences(Some(&steering)).unwrap(), middle.preferences(None).unwrap());
}

/// Mean log-likelihood of an answer with the edit made inside the network, the slow way.
fn mean_edited(
    decoder: &Decoder,
    d: &Dialogue,
    layer: usize,
    steering: &emaudit::Steering,
    positions: Positions,
) -> f64 {
    let batch = Batch::new(&[d.input()], &decoder.device).unwrap();
    let x = decoder.forward(&batch, None, None, &mut no_edit).unwrap();
    assert_eq!(layer, decoder.config.n_layers - 1);
    let mut rows = likelihood::last_rows(&x, 0, d.answer.len()).unwrap();
    let hidden = decoder.config.hidden_size;
    let range = match positions {
        Positions::FinalPrefill => 0..hidden,
        Positions::Generated => hidden..rows.len(),
        Positions::All => 0..rows.len(),
    };
    emaudit_train::generate::steer_rows(&mut rows[range], hidden, steering).unwrap();
    let tokens = likelihood::of_rows(decoder, &rows, &d.answer).unwrap();
    tokens.iter().sum::<f64>() / tokens.len() as f64
}
