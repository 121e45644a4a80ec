//! The kernels' logic, through OpenCL on a processor, against the library's kernels for processors.

use crate::cases::{self, Device, row_status};
use crate::rows::{Batch, KERNELS, Outcome};
use crate::skipped::missing;
use bytemuck::Pod;
use emaudit::activations::Element;
use emaudit::kernel::cuda::launch::{self, Argument, Launch, Matrix, SteerMemory, THREADS};
use emaudit::{Probe, ScoreUnit, Steering};
use emaudit_device::opencl::{Argument as Value, Memory, OpenCl};
use std::sync::OnceLock;

/// Bytes behind all memory that no kernel may touch.
const GUARD: usize = 4096;

fn device() -> Option<&'static OpenCl> {
    static DEVICE: OnceLock<Result<OpenCl, String>> = OnceLock::new();
    assert_eq!(emaudit_device::threads(), THREADS);
    match DEVICE.get_or_init(|| OpenCl::build(&emaudit_device::source(KERNELS))) {
        Ok(device) => Some(device),
        Err(why) => {
            missing("scoring and steering through OpenCL", &format!("{why}; Debian has pocl-opencl-icd"));
            None
        }
    }
}

/// Memory of one call; where scores or strengths are not given, their place holds `None`.
struct Arrays {
    memory: Vec<Option<Memory>>,
}

impl Arrays {
    fn run<const N: usize>(&self, cl: &OpenCl, launch: &Launch<[Argument<usize>; N]>) {
        let value = |argument: Argument<usize>| match argument {
            Argument::Memory(at) => self.memory[at].as_ref().map_or(Value::Null, Value::Memory),
            Argument::U32(v) => Value::U32(v),
            Argument::U64(v) => Value::U64(v),
            Argument::F32(v) => Value::F32(v),
            Argument::F64(v) => Value::F64(v),
        };
        if launch.blocks > 0 {
            cl.run(launch.kernel, launch.blocks as usize, THREADS, &launch.arguments.map(value));
        }
    }

    /// The first `count` elements, and that nothing behind them was touched.
    fn read<T: Pod>(&self, cl: &OpenCl, at: usize, count: usize) -> Vec<T> {
        let bytes = cl.read(self.memory[at].as_ref().unwrap());
        let (own, guard) = bytes.split_at(count * size_of::<T>());
        assert!(guard.iter().all(|b| *b == 0xa5), "memory {at} was written behind its end");
        own.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}

fn padded(vector: &[f32]) -> Vec<f32> {
    let mut padded = vector.to_vec();
    padded.resize(vector.len().next_multiple_of(8), 0.0);
    padded
}

fn matrix<T: Element>(batch: &Batch<T>, aligned: bool) -> Matrix<usize> {
    let Batch { rows, width, stride, .. } = *batch;
    Matrix { data: 0, dtype: T::DTYPE, rows, width, stride, aligned }
}

impl Device for OpenCl {
    fn score<T: Element + Pod>(
        &self,
        probe: &Probe,
        batch: &Batch<T>,
        unit: ScoreUnit,
        aligned: bool,
    ) -> Outcome<T> {
        let n = batch.rows;
        let direction = padded(probe.unit_direction());
        let memory = vec![
            Some(self.memory(&batch.data, GUARD)),
            Some(self.memory(&direction, GUARD)),
            Some(self.memory(&vec![0.0f32; n], GUARD)),
            // Statuses can be left out; the scores then say the same.
            aligned.then(|| self.memory(&vec![0x77u8; n], GUARD)),
        ];
        let arrays = Arrays { memory };
        arrays.run(self, &launch::score(matrix(batch, aligned), 1, 2, 3, &probe.scale(unit)).unwrap());
        let rows = arrays.read(self, 0, batch.data.len());
        assert!(bytemuck::cast_slice::<T, u8>(&rows) == bytemuck::cast_slice::<T, u8>(&batch.data));
        assert_eq!(arrays.read::<f32>(self, 1, direction.len()), direction);
        let scores: Vec<f32> = arrays.read(self, 2, n);
        let status = match aligned {
            true => row_status(&arrays.read::<u8>(self, 3, n)),
            false => row_status(&scores.iter().map(|s| u8::from(s.is_nan())).collect::<Vec<_>>()),
        };
        Outcome { scores, status, rows }
    }

    fn steer<T: Element + Pod>(
        &self,
        steering: &Steering,
        batch: &Batch<T>,
        unit: Option<ScoreUnit>,
        strengths: Option<&[f32]>,
        aligned: bool,
    ) -> Outcome<T> {
        let n = batch.rows;
        let memory = vec![
            Some(self.memory(&batch.data, GUARD)),
            Some(self.memory(&padded(steering.probe().unit_direction()), GUARD)),
            Some(self.memory(&padded(steering.vector()), GUARD)),
            strengths.map(|s| self.memory(s, GUARD)),
            unit.map(|_| self.memory(&vec![0.0f32; n], GUARD)),
            Some(self.memory(&vec![0x77u8; n], GUARD)),
        ];
        let arrays = Arrays { memory };
        let places = SteerMemory { direction: 1, vector: 2, strengths: 3, scores: 4, status: 5 };
        let scale = steering.probe().scale(unit.unwrap_or(ScoreUnit::Raw));
        let launch = launch::steer(matrix(batch, aligned), places, &scale, &steering.edit_on_device());
        arrays.run(self, &launch.unwrap());
        let scores = unit.map_or(Vec::new(), |_| arrays.read(self, 4, n));
        Outcome {
            scores,
            status: row_status(&arrays.read::<u8>(self, 5, n)),
            rows: arrays.read(self, 0, batch.data.len()),
        }
    }
}

#[test]
fn where_nothing_is_rounded_the_bits_are_the_processors() {
    let Some(device) = device() else { return };
    let compared = cases::exact_rows(device);
    println!("{compared} rows compared on {}", device.device);
    assert!(compared > 30_000, "{compared}");
}

#[test]
fn elsewhere_scores_and_edits_are_within_the_contract() {
    device().into_iter().for_each(cases::rounded_rows);
}

#[test]
fn edits_stay_in_the_range_of_the_dtype() {
    device().into_iter().for_each(cases::range);
}

#[test]
fn every_half_is_read_and_written_as_the_processor_does() {
    device().into_iter().for_each(cases::every_half);
}
