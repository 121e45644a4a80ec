//! NF4 against bitsandbytes, and gradients through frozen NF4 layers.

use crate::fixture::*;
use candle_core::{Device, Tensor, Var};
use emaudit_train::finetune::{Example, response_loss};
use emaudit_train::lora::{Adapter, LoraConfig};
use emaudit_train::model::Module;
use emaudit_train::quant::{BLOCK, CODEBOOK, Frozen, Nf4, SCALE_BLOCK, Storage, dynamic_map};
use emaudit_train::random::uniform;

on_every_device!(gradients_pass_through_nf4_as_through_its_decoded_weight,);

/// Bell-shaped values whose spread changes from block to block, as `make_fixtures.py` draws them.
fn bell() -> Vec<f32> {
    let n = 320 * 64;
    let value = |i: usize| {
        let u = |k: usize| uniform(&[4, (k * n + i) as u64]);
        (u(0) + u(1) + u(2) + u(3) - 2.0) * (0.02 + 0.06 * uniform(&[5, (i / 64) as u64]))
    };
    (0..n).map(|i| value(i) as f32).collect()
}

/// Steps between two floats of the same sign.
fn ulps(a: f32, b: f32) -> u32 {
    if a == b { 0 } else { a.to_bits().abs_diff(b.to_bits()) }
}

#[test]
fn codebook_and_scale_map_are_those_of_bitsandbytes() {
    let golden = Golden::open("nf4.safetensors");
    assert_eq!(flat(golden.get("codebook")), CODEBOOK);
    assert_eq!(flat(golden.get("scale_map")), dynamic_map());
}

#[test]
fn codes_and_scales_are_those_of_bitsandbytes() {
    let golden = Golden::open("nf4.safetensors");
    for (name, values, rows) in [("bell", bell(), 320), ("hard", flat(golden.get("hard.input")), 64)] {
        let of = |part: &str| golden.get(&format!("{name}.{part}"));
        let stored = flat(of("input"));
        assert!(values.iter().zip(&stored).all(|(a, b)| a.to_bits() == b.to_bits()), "the inputs differ");
        let own = Nf4::quantize(&values, rows, 64).unwrap();

        let expected: Vec<u8> = of("packed").to_vec1().unwrap();
        assert_eq!(own.packed.len(), expected.len());
        let code = |packed: &[u8], i: usize| {
            if i.is_multiple_of(2) { packed[i / 2] >> 4 } else { packed[i / 2] & 15 }
        };
        let mut ties = 0;
        for (i, v) in values.iter().enumerate() {
            let (a, b) = (code(&own.packed, i), code(&expected, i));
            if a != b {
                // Only a value at the same distance from both codes may go either way.
                let scale = values[i / BLOCK * BLOCK..][..BLOCK].iter().fold(0f32, |m, v| m.max(v.abs()));
                let distance = |c: u8| (v * (1.0 / scale) - CODEBOOK[c as usize]).abs();
                assert_eq!(
                    distance(a),
                    distance(b),
                    "{name}: value {i} = {v} has code {a}, bitsandbytes says {b}"
                );
                ties += 1;
            }
        }

        let scale_codes: Vec<u8> = of("scale_codes").to_vec1().unwrap();
        let differing = own.scale_codes.iter().zip(&scale_codes).filter(|(a, b)| a != b).count();
        assert_eq!(own.scale_absmax.len(), rows.div_ceil(SCALE_BLOCK));
        let worst = |own: &[f32], expected: &[f32]| {
            assert_eq!(own.len(), expected.len());
            own.iter().zip(expected).map(|(a, b)| ulps(*a, *b)).max().unwrap()
        };
        let second = worst(&own.scale_absmax, &flat(of("scale_absmax")));
        let offset = golden.scalar(&format!("{name}.offset"));
        let offset_off = ulps(own.scale_offset, offset);
        // A scale is a sum with the offset, so one ulp of the offset is what a small scale may be off by where
        // an outlier has made the offset large. A decoded value is at most its scale, and rounded once more.
        let ulp = |v: f32| f32::from_bits(v.abs().to_bits() + 1) - v.abs();
        let off = |own: &[f32], expected: &[f32]| {
            let pairs = own.iter().zip(expected);
            pairs.map(|(a, b)| (a - b).abs() / ulp(b.abs().max(offset))).fold(0f32, f32::max)
        };
        let scales_off = off(&own.scales(), &flat(of("scales")));
        let expected = flat(of("decoded"));
        let values_off = off(&own.dequantize()[..expected.len()], &expected);
        println!(
            "{name}: {} codes, {ties} differ (ties); {differing} scale codes differ; ulps: second level {second}, \
             offset {offset_off}, scales {scales_off}, decoded {values_off}",
            values.len()
        );
        assert_eq!(differing, 0, "{name}: scale codes");
        assert!(second <= 1 && offset_off <= 1, "{name}: {second} {offset_off}");
        assert!(scales_off <= 1.0 && values_off <= 2.0, "{name}: scales {scales_off}, decoded {values_off}");
    }
}

fn gradients_pass_through_nf4_as_through_its_decoded_weight(device: &Device) {
    let values: Vec<f32> = bell()[..96 * 64].to_vec();
    let weight = Tensor::from_vec(values.clone(), (96, 64), device).unwrap();
    let decoded = Nf4::quantize(&values, 96, 64).unwrap().dequantize();
    let decoded = Tensor::from_vec(decoded, (96, 64), device).unwrap();
    let bias = Tensor::from_vec(bell()[..96].to_vec(), 96, device).unwrap();
    let x = Var::from_vec(bell()[6144..6144 + 5 * 64].to_vec(), (5, 64), device).unwrap();
    let weights = Tensor::from_vec(bell()[9000..9000 + 5 * 96].to_vec(), (5, 96), device).unwrap();
    let objective = |y: &Tensor| (y.sqr().unwrap() * &weights).unwrap().sum_all().unwrap();

    let by_hand = x.matmul(&decoded.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
    let expected = objective(&by_hand).backward().unwrap().get(&x).unwrap().clone();
    for keep in [true, false] {
        let layer = Frozen::new(weight.clone(), Some(bias.clone()), Storage::Nf4, keep).unwrap();
        assert_same("weight", &layer.weight().unwrap(), &decoded);
        let y = layer.forward(&x, None).unwrap();
        // The decoded weight is multiplied in the same order; candle's product has another.
        let plain = Frozen::new(decoded.clone(), Some(bias.clone()), Storage::None, false).unwrap();
        assert_same("forward", &y, &plain.forward(&x, None).unwrap());
        assert_close("forward", &y, &by_hand, tolerance(64 + 1));
        let gradient = objective(&y).backward().unwrap().get(&x).unwrap().clone();
        assert_close("gradient", &gradient, &expected, tolerance(96 + 64));
    }
}

#[test]
fn an_nf4_model_is_the_model_of_its_decoded_weights() {
    let quantized = load(&path("tiny"), Storage::Nf4).unwrap();
    let decoded = edited(|tensors, _| {
        for (name, tensor) in tensors.iter_mut().filter(|(name, _)| name.contains("_proj")) {
            let (rows, cols) = tensor.dims2().unwrap();
            let values = Nf4::quantize(&flat(tensor), rows, cols).unwrap().dequantize();
            assert_ne!(values, flat(tensor), "{name} should lose something");
            *tensor = Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap();
        }
    });
    let decoded = load(decoded.path(), Storage::None).unwrap();
    let ids = Golden::open("golden.safetensors").ids(0);
    assert_same("logits", &logits(&quantized, &ids, None), &logits(&decoded, &ids, None));
    let off = deviation(&logits(&quantized, &ids, None), &logits(&tiny(), &ids, None));
    assert!((0.01..0.5).contains(&off), "NF4 moves the logits by {off}");
}

/// Central differences of the loss along random directions, through the whole NF4 model.
#[test]
fn gradients_are_the_slopes_of_the_loss() {
    let decoder = load(&path("tiny"), Storage::Nf4).unwrap();
    let examples = Golden::open("golden.safetensors").examples();
    let examples: Vec<&Example> = examples.iter().collect();
    let config = LoraConfig { r: 4, lora_alpha: 10.0, use_rslora: true };
    let mut drawn = 0;
    let start = || {
        drawn += 1;
        uniform(&[1, drawn]) as f32
    };
    let (adapter, vars) = Adapter::trainable(&decoder, &config, start).unwrap();
    let noise = |var: &Var, address: u64| {
        let n = var.elem_count();
        let values = (0..n).map(|i| 2.0 * uniform(&[address, i as u64]) as f32 - 1.0).collect::<Vec<_>>();
        Tensor::from_vec(values, var.dims(), &Device::Cpu).unwrap()
    };
    for (i, var) in vars.iter().enumerate() {
        var.set(&((var.as_tensor().detach() + (noise(var, 100 + i as u64) * 0.05).unwrap()).unwrap()))
            .unwrap();
    }
    let loss = || response_loss(&decoder, Some(&adapter), &examples).unwrap();
    let gradients = loss().backward().unwrap();
    // Step h: truncation grows with h^2, the rounding of the loss (some 1e-6, see the parity of the loss) with
    // 1/h. At h = 0.005 a slope is right to 2e-4 plus a fraction of its own size.
    let h = 0.005f64;
    let mut worst = 0f64;
    for (k, module) in Module::ALL.iter().enumerate() {
        for part in 0..2 {
            // The module's A or B in every layer at once.
            let chosen = |i: usize| i % 14 == 2 * k + part;
            let picked: Vec<(usize, &Var)> = vars.iter().enumerate().filter(|(i, _)| chosen(*i)).collect();
            assert_eq!(picked.len(), decoder.config.n_layers);
            let mut slope = 0f64;
            let mut originals = Vec::new();
            for &(i, var) in &picked {
                let direction = noise(var, 1000 + i as u64);
                let dot = (gradients.get(var).unwrap() * &direction).unwrap().sum_all().unwrap();
                slope += dot.to_scalar::<f32>().unwrap() as f64;
                originals.push((var, var.as_tensor().detach().copy().unwrap(), direction));
            }
            let at = |step: f64| {
                for (var, original, direction) in &originals {
                    var.set(&(original + (direction * step).unwrap()).unwrap()).unwrap();
                }
                loss().to_scalar::<f32>().unwrap() as f64
            };
            let measured = (at(h) - at(-h)) / (2.0 * h);
            at(0.0);
            let error = (measured - slope).abs() / (slope.abs() + 0.1);
            println!("{module:?} {}: gradient {slope:.5}, difference {measured:.5}", ["A", "B"][part]);
            worst = worst.max(error);
            assert!(error < 5e-3, "{module:?}: gradient {slope}, difference {measured}");
        }
    }
    println!("worst relative error of a slope: {worst:.1e}");
}
