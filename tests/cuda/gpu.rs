//! Everything on a GPU: `cargo test -p emaudit --test cuda -- --ignored`.

use crate::cases::{self, Device, row_status};
use crate::rows::{Batch, Outcome, exact, exact_probe, scored, steered, steerings};
use bytemuck::Pod;
use emaudit::activations::Element;
use emaudit::device::{DeviceProbe, DeviceRows, DeviceSlice, DeviceStream};
use emaudit::{Probe, ScoreUnit, Steering};
use emaudit_device::gpu::{Gpu, Memory, Stream};

/// Elements before and behind all memory that no kernel may touch; 16 bytes of any dtype divide it.
const GUARD: usize = 1024;

/// The GPU with a stream.
struct OnGpu<'a> {
    gpu: &'a Gpu,
    stream: Stream<'a>,
}

/// Memory between guards.
struct Guarded<'a, T> {
    memory: Memory<'a>,
    values: usize,
    before: usize,
    guard: T,
}

impl<'a, T: Pod + PartialEq> Guarded<'a, T> {
    /// `before` elements of `guard`, then the values, then [`GUARD`] more.
    fn new(gpu: &'a Gpu, values: &[T], guard: T, before: usize) -> Self {
        let mut all = vec![guard; before];
        all.extend_from_slice(values);
        all.resize(all.len() + GUARD, guard);
        Guarded { memory: gpu.memory(&all), values: values.len(), before, guard }
    }

    fn address(&self) -> u64 {
        self.memory.address + (self.before * size_of::<T>()) as u64
    }

    fn slice<U>(&self) -> DeviceSlice<U> {
        // SAFETY: the memory outlives the wait of `read`, and one stream uses it.
        unsafe { DeviceSlice::from_raw(self.address(), self.values) }.unwrap()
    }

    /// The values, once the GPU has run everything.
    fn read(&self) -> Vec<T> {
        let all = self.memory.read::<T>();
        let (before, rest) = all.split_at(self.before);
        let (own, behind) = rest.split_at(self.values);
        assert!(before.iter().chain(behind).all(|v| *v == self.guard), "memory beside an array was written");
        own.to_vec()
    }
}

/// What one call writes to beside the rows.
struct Results<'a> {
    scores: Guarded<'a, f32>,
    status: Guarded<'a, u8>,
}

impl OnGpu<'_> {
    fn stream(&self) -> DeviceStream {
        // SAFETY: it lives as long as `self`.
        unsafe { DeviceStream::from_raw(self.stream.handle) }
    }

    /// The bytes of rows, which begin one element further on where they are not to be aligned.
    fn rows<T: Element + Pod>(&self, batch: &Batch<T>, aligned: bool) -> (Guarded<'_, u8>, DeviceRows) {
        let before = GUARD + if aligned { 0 } else { size_of::<T>() };
        let memory = Guarded::new(self.gpu, bytemuck::cast_slice(&batch.data), 0xa5, before);
        let Batch { rows, width, stride, .. } = *batch;
        // SAFETY: the memory outlives the stream's work, and one stream writes to it.
        let view = unsafe { DeviceRows::from_raw(memory.address(), T::DTYPE, rows, width, stride) };
        (memory, view.unwrap())
    }

    fn results(&self, rows: usize, aligned: bool) -> Results<'_> {
        let before = GUARD + usize::from(!aligned);
        Results {
            scores: Guarded::new(self.gpu, &vec![0.0f32; rows], -3.0, before),
            status: Guarded::new(self.gpu, &vec![0x77u8; rows], 0x55, before),
        }
    }
}

/// Elements from their bytes.
fn elements<T: Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

impl Device for OnGpu<'_> {
    fn score<T: Element + Pod>(
        &self,
        probe: &Probe,
        batch: &Batch<T>,
        unit: ScoreUnit,
        aligned: bool,
    ) -> Outcome<T> {
        let on_device = DeviceProbe::new(probe).unwrap();
        let (memory, rows) = self.rows(batch, aligned);
        let Results { scores, status } = self.results(batch.rows, aligned);
        on_device.score(&rows, unit, scores.slice(), Some(status.slice()), self.stream()).unwrap();
        let after = memory.read();
        assert!(after == bytemuck::cast_slice::<T, u8>(&batch.data));
        Outcome { scores: scores.read(), status: row_status(&status.read()), rows: elements(&after) }
    }

    fn steer<T: Element + Pod>(
        &self,
        steering: &Steering,
        batch: &Batch<T>,
        unit: Option<ScoreUnit>,
        strengths: Option<&[f32]>,
        aligned: bool,
    ) -> Outcome<T> {
        let on_device = DeviceProbe::new(steering.probe()).unwrap();
        let (memory, rows) = self.rows(batch, aligned);
        let Results { scores, status } = self.results(batch.rows, aligned);
        let strengths = strengths.map(|s| Guarded::new(self.gpu, s, -3.0, GUARD));
        let (wanted, strengths) = (unit.map(|u| (u, scores.slice())), strengths.as_ref().map(Guarded::slice));
        on_device.steer(steering, &rows, wanted, strengths, status.slice(), self.stream()).unwrap();
        let scores = if unit.is_some() { scores.read() } else { Vec::new() };
        Outcome { scores, status: row_status(&status.read()), rows: elements(&memory.read()) }
    }
}

/// Runs `test` on the GPU, or fails: who asks for these tests has one.
fn on_gpu(test: impl FnOnce(OnGpu<'_>)) {
    let gpu = Gpu::find().unwrap_or_else(|why| panic!("these tests need an NVIDIA GPU: {why}"));
    println!("on {}", gpu.name);
    test(OnGpu { gpu: &gpu, stream: gpu.stream() });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn where_nothing_is_rounded_the_bits_are_the_processors() {
    on_gpu(|device| assert!(cases::exact_rows(&device) > 30_000));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn elsewhere_scores_and_edits_are_within_the_contract() {
    on_gpu(|device| cases::rounded_rows(&device));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn edits_stay_in_the_range_of_the_dtype() {
    on_gpu(|device| cases::range(&device));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_half_is_read_and_written_as_the_processor_does() {
    on_gpu(|device| cases::every_half(&device));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_captured_call_scores_and_steers_at_every_replay() {
    on_gpu(|device| {
        let probe = exact_probe(576);
        let steering = &steerings(&probe)[0];
        let batch = Batch::<f32>::new(33, 576, 0, exact);
        let on_device = DeviceProbe::new(&probe).unwrap();
        let (memory, rows) = device.rows(&batch, true);
        let Results { scores, status } = device.results(batch.rows, true);
        let graph = device.stream.captured(|| {
            let scores = Some((ScoreUnit::Raw, scores.slice()));
            on_device.steer(steering, &rows, scores, None, status.slice(), device.stream()).unwrap();
        });
        assert!(scores.read().iter().all(|s| *s == 0.0), "capturing ran the kernel");
        let mut expected = batch.clone();
        for _ in 0..3 {
            graph.launch(&device.stream);
            let outcome = steered(steering, &expected, ScoreUnit::Raw, None);
            assert_eq!(scores.read(), outcome.scores);
            expected.data = outcome.rows;
            assert_eq!(elements::<f32>(&memory.read()), expected.data);
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn streams_share_a_probe() {
    on_gpu(|device| {
        let probe = exact_probe(2048);
        let batch = Batch::<f32>::new(500, 2048, 0, exact);
        let expected = scored(&probe, &batch, ScoreUnit::AlignedSd);
        let on_device = DeviceProbe::new(&probe).unwrap();
        let streams: Vec<Stream> = (0..4).map(|_| device.gpu.stream()).collect();
        let outputs: Vec<_> = streams.iter().map(|_| device.results(batch.rows, true).scores).collect();
        let (_memory, rows) = device.rows(&batch, true);
        for (stream, scores) in streams.iter().zip(&outputs).cycle().take(200) {
            // SAFETY: it lives until the reads below.
            let stream = unsafe { DeviceStream::from_raw(stream.handle) };
            on_device.score(&rows, ScoreUnit::AlignedSd, scores.slice(), None, stream).unwrap();
        }
        outputs.iter().for_each(|scores| assert_eq!(scores.read(), expected.scores));
    });
}
