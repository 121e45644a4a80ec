//! `cargo bench --bench device [-- [--json] [--only NAME] [--width N]]`: scoring and steering on a GPU against copying as
//! many bytes within its memory, in the same run.
//!
//! Times are the GPU's, in nanoseconds for one row of many. The peer is what a copy by the driver would take to move as
//! many bytes as the call must: scoring reads each activation once, steering reads and writes it once.

#[allow(dead_code)] // the other benchmark uses more of it
mod measure;

use emaudit::device::{DeviceProbe, DeviceRows, DeviceSlice, DeviceStream};
use emaudit::{Dtype, Operation, Probe, ScoreUnit, Steering, SteeringOptions};
use emaudit_device::gpu::{Gpu, Memory, Stream};
use half::{bf16, f16};
use measure::{Pair, Report};

/// Bytes of the rows: more than any cache of a GPU.
const BYTES: usize = 1 << 29;
const PAIRS: usize = 15;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let after = |name: &str| {
        let at = arguments.iter().position(|a| a == name)?;
        arguments.get(at + 1).cloned()
    };
    let width = after("--width").map(|w| w.parse().expect("--width takes a number"));
    let gpu = match Gpu::find() {
        Ok(gpu) => gpu,
        Err(why) => return eprintln!("skipped: benchmark on a GPU: {why}"),
    };
    let report = Report::new(arguments.iter().any(|a| a == "--json"), after("--only"), width);
    report.note(&gpu.name);
    let stream = gpu.stream();
    let copy = gpu.memory(&vec![0u8; BYTES / 2]);
    for width in [576, 1536, 2048, 2304, 3072, 4096, 8192] {
        if report.wants_width(width) {
            for dtype in Dtype::ALL {
                bench(&gpu, &stream, &report, &copy, width, dtype);
            }
        }
    }
}

/// Elements of a normal size: what lies outside takes another way through the kernels.
fn values(dtype: Dtype) -> Vec<u8> {
    let value = |i: usize| ((i * 37) % 251) as f32 / 64.0 - 2.0;
    let all = 0..BYTES / dtype.size();
    match dtype {
        Dtype::F32 => all.flat_map(|i| value(i).to_le_bytes()).collect(),
        Dtype::F16 => all.flat_map(|i| f16::from_f32(value(i)).to_le_bytes()).collect(),
        Dtype::Bf16 => all.flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect(),
    }
}

fn bench(gpu: &Gpu, stream: &Stream, report: &Report, copy: &Memory, width: usize, dtype: Dtype) {
    let memory = gpu.memory(&values(dtype));
    let direction: Vec<f32> = (0..width).map(|i| (i % 7) as f32 - 2.5).collect();
    let probe = Probe::from_vectors(&direction, &vec![0.0; width], 1.0, None).expect("sound vectors");
    let operation = Operation::Subtract { alpha: 1e-3 };
    let options = SteeringOptions { allow_nonspecific: true, ..SteeringOptions::new(operation) };
    let steering = Steering::new(&probe, options).expect("sound options");
    let on_device = DeviceProbe::new(&probe).expect("a probe on the GPU");
    let row = width * dtype.size();
    let count = BYTES / row;
    let (scores, statuses) = (gpu.memory(&vec![0.0f32; count]), gpu.memory(&vec![0u8; count]));
    // SAFETY: all memory outlives the waits, and one stream uses it.
    let (rows, scores, status, handle) = unsafe {
        (
            DeviceRows::from_raw(memory.address, dtype, count, width, width).expect("rows"),
            DeviceSlice::from_raw(scores.address, count).expect("scores"),
            DeviceSlice::from_raw(statuses.address, count).expect("statuses"),
            DeviceStream::from_raw(stream.handle),
        )
    };
    // A copy of half the bytes reads and writes as many as scoring reads.
    let line = |name: &str, moved: usize, work: &mut dyn FnMut()| {
        if !report.wants(name) {
            return;
        }
        work();
        let mut samples: Vec<(f64, f64)> = (0..PAIRS)
            .map(|_| {
                let ours = f64::from(stream.milliseconds(&mut *work));
                let copied = f64::from(stream.milliseconds(|| stream.copy(&memory, copy)));
                (ours * 1e6 / count as f64, copied * 1e6 / count as f64 * moved as f64)
            })
            .collect();
        samples.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
        let (ours, peer) = samples[PAIRS / 2];
        report.line(
            name,
            width,
            dtype.as_str(),
            "copy of as many bytes",
            Pair { ours, peer, ratio: ours / peer },
        );
        report.note(&format!("{name} {width} {}: {:.0} GB/s", dtype.as_str(), (moved * row) as f64 / ours));
    };
    line("device score", 1, &mut || {
        on_device.score(&rows, ScoreUnit::Raw, scores, None, handle).expect("scoring");
    });
    line("device steer", 2, &mut || {
        on_device.steer(&steering, &rows, None, None, status, handle).expect("steering");
    });
    line("device score+steer", 2, &mut || {
        let scores = Some((ScoreUnit::Raw, scores));
        on_device.steer(&steering, &rows, scores, None, status, handle).expect("steering");
    });
    // All of them were edited, and none took another way.
    assert!(statuses.read::<u8>().iter().all(|status| *status == 0), "a row was not steered");
}
