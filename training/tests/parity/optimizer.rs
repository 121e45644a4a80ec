//! 8-bit AdamW against bitsandbytes.

use crate::fixture::*;
use candle_core::{Device, Tensor, Var};
use emaudit_train::finetune::optimizer::AdamW;
use emaudit_train::quant::{DYNAMIC_BLOCK, Sign};
use emaudit_train::random;
use emaudit_train::recipe::Optimizer;

const COUNT: usize = 4400;
const STEPS: usize = 5;

fn draw(seed: u64) -> Vec<f32> {
    (0..COUNT as u64).map(|i| (random::uniform(&[seed, i]) - 0.5) as f32).collect()
}

#[test]
fn the_maps_are_those_of_bitsandbytes() {
    let golden = Golden::open("optimizer.safetensors");
    for (sign, name) in [(Sign::Signed, "signed_map"), (Sign::Unsigned, "unsigned_map")] {
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        // The sign of its zero is nobody's business.
        let expected: Vec<f32> = flat(golden.get(name)).iter().map(|v| v + 0.0).collect();
        assert_eq!(bits(sign.map()), bits(&expected), "{name}");
    }
}

/// Five steps with gradients whose sizes differ from block to block, one block without any at first.
#[test]
fn five_steps_are_those_of_bitsandbytes() {
    let golden = Golden::open("optimizer.safetensors");
    let device = &Device::Cpu;
    let vars = [Var::from_vec(draw(80), COUNT, device).unwrap()];
    let mut optimizer = AdamW::new(&vars, Optimizer::Adamw8bit, 0.01).unwrap();
    let mut compared = 0;
    for step in 0..STEPS {
        let mut gradient = draw(81 + step as u64);
        for (i, g) in gradient.iter_mut().enumerate() {
            *g *= 2f32.powi((i / DYNAMIC_BLOCK) as i32 - 17);
        }
        if step == 0 {
            gradient[..DYNAMIC_BLOCK].fill(0.0);
        }
        let gradient = Tensor::from_vec(gradient, COUNT, device).unwrap();
        optimizer.step(&vars, &[Some(gradient)], step, 1e-2, 1.0).unwrap();

        // An update of at most about the learning rate comes from a dozen roundings, the value from one more.
        let (own, expected) = (flat(vars[0].as_tensor()), flat(golden.get(&format!("{step}.values"))));
        let worst = own.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let allowed = (step + 1) as f32 * (12.0 * 1e-2 + 0.5) * f32::EPSILON;
        println!("step {step}: values off by {worst:e} of {allowed:e}");
        assert!(worst <= allowed, "step {step}: {worst:e}");
        if step != 0 && step != STEPS - 1 {
            continue;
        }
        let state = optimizer.state().unwrap();
        for (own, theirs) in [("m", "state1"), ("v", "state2")] {
            let scales = flat(&state[&format!("{own}_absmax.0")]);
            let expected = flat(golden.get(&format!("{step}.{}", theirs.replace("state", "absmax"))));
            for (a, b) in scales.iter().zip(&expected) {
                assert!((a - b).abs() <= 4.0 * f32::EPSILON * b, "scale {a} for {b}");
            }
            let codes = |t: &Tensor| t.to_vec1::<u8>().unwrap();
            let own_codes = codes(&state[&format!("{own}.0")]);
            let expected = codes(golden.get(&format!("{step}.{theirs}")));
            for (i, (a, b)) in own_codes.iter().zip(&expected).enumerate() {
                // A block of zeros has a scale of zero, whatever its codes.
                if scales[i / DYNAMIC_BLOCK] > 0.0 {
                    assert_eq!(a, b, "{own}, value {i}, step {step}");
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 15_000, "{compared}");
}

/// Small variables keep f32 moments; what is stored comes back.
#[test]
fn the_state_is_stored_whole() {
    let device = &Device::Cpu;
    let vars = || [4096usize, 4095].map(|n| Var::zeros(n, candle_core::DType::F32, device).unwrap());
    let gradient = |n: usize| Some(Tensor::from_vec(draw(3)[..n].to_vec(), n, device).unwrap());
    let gradients = [gradient(4096), gradient(4095)];
    let (first, second) = (vars(), vars());
    let mut one = AdamW::new(&first, Optimizer::Adamw8bit, 0.0).unwrap();
    one.step(&first, &gradients, 0, 1e-2, 0.5).unwrap();
    let state = one.state().unwrap();
    let names: Vec<&str> = state.keys().map(String::as_str).collect();
    assert_eq!(names, ["m.0", "m.1", "m_absmax.0", "v.0", "v.1", "v_absmax.0"]);
    for (a, b) in first.iter().zip(&second) {
        b.set(&a.as_tensor().copy().unwrap()).unwrap();
    }
    let mut other = AdamW::new(&second, Optimizer::Adamw8bit, 0.0).unwrap();
    let get = |name: String| state.get(&name).cloned().ok_or_else(|| anyhow::anyhow!("no {name}"));
    other.restore(&get).unwrap();
    for optimizer in [(&mut one, &first), (&mut other, &second)] {
        optimizer.0.step(optimizer.1, &gradients, 1, 1e-2, 0.5).unwrap();
    }
    for (a, b) in first.iter().zip(&second) {
        assert_same("values", a.as_tensor(), b.as_tensor());
    }
    let missing = |name: String| -> anyhow::Result<Tensor> { anyhow::bail!("the checkpoint lacks `{name}`") };
    assert!(other.restore(&missing).unwrap_err().to_string().contains("lacks `m.0`"));
}
