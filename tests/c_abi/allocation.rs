//! Scoring, steering and monitoring through the C ABI allocate nothing when they succeed.

use super::fixture::{self, LAYER, WIDTH};
use emaudit::ffi::{
    audit::*, directions::*, drift::*, error::EMAUDIT_STATUS_NOT_LANDED, layers::*, monitor::*, probe::*,
    slot::*, steering::*, tensor::*,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::{null, null_mut};

/// The system's allocator, which counts the calls of each thread.
struct Counting;

thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // A thread that is ending has no counter any more.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count();
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A handle from a constructor that must succeed.
fn make<T>(constructor: impl FnOnce(*mut *mut T) -> i32) -> *mut T {
    let mut handle = null_mut();
    assert_eq!(constructor(&mut handle), 0);
    handle
}

#[test]
fn the_hot_path_allocates_nothing() {
    const ROWS: usize = 4;
    let bytes = fixture::file(fixture::specific());
    let mut data = fixture::values(ROWS * WIDTH, 5);
    let (mut scores, mut status) = ([0.0f32; ROWS], [0u8; ROWS]);
    let mut several = [0.0f32; 2 * ROWS];
    let tensor = emaudit_tensor {
        struct_size: size_of::<emaudit_tensor>() as u32,
        dtype: EMAUDIT_DTYPE_F32,
        data: data.as_mut_ptr().cast(),
        rows: ROWS,
        cols: WIDTH,
        row_stride: 0,
    };
    let steering_options = emaudit_steering_options {
        struct_size: size_of::<emaudit_steering_options>() as u32,
        operation: EMAUDIT_OPERATION_CLAMP,
        alpha: 0.0,
        ceiling: 0.0,
        has_gate: 0,
        gate: 0.0,
        has_dose_limit: 1,
        dose_limit: 0.5,
        allow_nonspecific: 0,
        reserved: 0,
    };
    let drift_options = emaudit_drift_options { struct_size: 16, window: ROWS as u32, rate: 0.01 };
    let monitor_options =
        emaudit_monitor_options { struct_size: 16, aggregation: EMAUDIT_AGGREGATION_MEAN, rate: 0.01 };
    // SAFETY: live handles and valid pointers throughout; everything is freed once.
    unsafe {
        let directions =
            make(|out| emaudit_directions_from_bytes(bytes.as_ptr(), bytes.len(), null(), out, null_mut()));
        let probe = make(|out| emaudit_probe_new(directions, LAYER, null(), out, null_mut()));
        let steering = make(|out| emaudit_steering_new(probe, &steering_options, out, null_mut()));
        // A gate that no row passes: rows that were to stay are where they were.
        let inert_options = emaudit_steering_options { has_gate: 1, gate: 1e9, ..steering_options };
        let inert = make(|out| emaudit_steering_new(probe, &inert_options, out, null_mut()));
        let monitor = make(|out| emaudit_monitor_new(probe, &monitor_options, out, null_mut()));
        let drift = make(|out| emaudit_drift_new(probe, &drift_options, out, null_mut()));
        assert_eq!(emaudit_monitor_watch(monitor, drift, null_mut()), 0);
        let audit_options = emaudit_audit_options {
            struct_size: size_of::<emaudit_audit_options>() as u32,
            aggregation: EMAUDIT_AGGREGATION_MEAN,
            horizon: 1,
            reserved: 0,
            rate: 0.0,
            level: 0.01,
            concern: 0.1,
        };
        let audit = make(|out| emaudit_audit_new(probe, &audit_options, out, null_mut()));
        let mut audited: emaudit_audit_verdict = std::mem::zeroed();
        audited.struct_size = size_of::<emaudit_audit_verdict>() as u32;
        let mut report: emaudit_drift_report = std::mem::zeroed();
        report.struct_size = size_of::<emaudit_drift_report>() as u32;
        let slot = make(|out| emaudit_probe_slot_new(probe, out, null_mut()));
        // A thread's first acquire is the one that may allocate.
        emaudit_probe_free(make(|out| emaudit_probe_slot_acquire(slot, out, null_mut())));
        let mut acquired = null_mut();
        let mut verdict: emaudit_verdict = std::mem::zeroed();
        verdict.struct_size = size_of::<emaudit_verdict>() as u32;
        let (scores, status) = (scores.as_mut_ptr(), status.as_mut_ptr());

        // The same rows before and after: right where no row was to be edited, an edit that was dropped elsewhere.
        let check_landed = |steering| {
            let (rows, none) = (&raw const tensor, null_mut());
            emaudit_steering_check_landed(steering, rows, rows, null(), null_mut(), null_mut(), none)
        };

        let before = CALLS.get();
        let outcomes = [
            emaudit_probe_slot_acquire(slot, &mut acquired, null_mut()),
            emaudit_probe_score(acquired, &tensor, EMAUDIT_UNIT_RAW, scores, status, null_mut()),
            emaudit_probe_score_all(
                [probe.cast_const(), acquired.cast_const()].as_ptr(),
                2,
                &tensor,
                EMAUDIT_UNIT_RAW,
                several.as_mut_ptr(),
                status,
                null_mut(),
            ),
            emaudit_steering_score_and_apply(
                steering,
                &tensor,
                EMAUDIT_UNIT_ALIGNED_SD,
                scores,
                null(),
                status,
                null_mut(),
                null_mut(),
            ),
            check_landed(inert),
            emaudit_drift_push(drift, scores, ROWS, null_mut()),
            emaudit_drift_get_report(drift, &mut report, null_mut()),
            emaudit_monitor_push(monitor, scores, ROWS, null_mut()),
            emaudit_monitor_get_verdict(monitor, &mut verdict, null_mut()),
            emaudit_monitor_reset(monitor, null_mut()),
            emaudit_audit_push(audit, scores, ROWS, null_mut()),
            emaudit_audit_get_verdict(audit, &mut audited, null_mut()),
        ];
        let dropped = check_landed(steering);
        emaudit_probe_free(acquired);
        let calls = CALLS.get() - before;

        assert_eq!(outcomes, [0; 12]);
        assert_eq!(dropped, EMAUDIT_STATUS_NOT_LANDED);
        assert!(before > 0, "the counter counts");
        assert_eq!(calls, 0);
        assert!(several.iter().all(|score| *score != 0.0));
        assert_ne!(verdict.state, EMAUDIT_STATE_INVALID);
        assert_eq!(report.windows, 1);
        assert_eq!(audited.judged, 1);
        emaudit_audit_free(audit);
        emaudit_steering_free(inert);
        emaudit_drift_free(drift);
        emaudit_probe_slot_free(slot);
        emaudit_directions_free(directions);
        emaudit_probe_free(probe);
        emaudit_steering_free(steering);
        emaudit_monitor_free(monitor);
    }
}
