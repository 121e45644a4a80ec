//! Hot reload: places that hold a probe or a steering and have it replaced under load.

use super::boundary::{borrow, check_pointer, guard, hand_out, hand_out_shared, share, take_back};
use super::error::{emaudit_error, emaudit_status};
use super::probe::emaudit_probe;
use super::steering::emaudit_steering;
use crate::error::Result;
use crate::reload::Reloadable;

/// A place that holds one probe. Requests acquire the probe of the moment while another thread replaces it:
///
/// ```c
/// emaudit_probe *probe = NULL;
/// if (emaudit_probe_slot_acquire(slot, &probe, NULL) == EMAUDIT_STATUS_OK) {
///   ... score all rows of the request with it ...
///   emaudit_probe_free(probe);
/// }
/// ```
///
/// Use one acquired probe for all of a request, and for all of a sequence that a monitor follows. Share the slot
/// between threads freely.
pub struct emaudit_probe_slot {
    current: Reloadable<emaudit_probe>,
}

/// A place that holds one steering, as `emaudit_probe_slot` holds a probe.
pub struct emaudit_steering_slot {
    current: Reloadable<emaudit_steering>,
}

// What the documentation promises: both are used from any thread.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<emaudit_probe_slot>();
    shared::<emaudit_steering_slot>();
};

/// # Safety
/// `handle` is a live probe or steering; a non-null `out` is valid for writing.
unsafe fn make<T, S>(
    handle: *const T,
    name: &str,
    out: *mut *mut S,
    slot: impl FnOnce(Reloadable<T>) -> S,
) -> Result<()> {
    check_pointer(out.cast_const(), "slot")?;
    let value = unsafe { share(handle, name)? };
    // SAFETY: checked above, writable by the caller's word.
    unsafe { hand_out(out, slot(Reloadable::new(value))) };
    Ok(())
}

/// # Safety
/// A non-null `out` is valid for writing.
unsafe fn acquire<T>(current: &Reloadable<T>, out: *mut *mut T, name: &str) -> Result<()> {
    check_pointer(out.cast_const(), name)?;
    // SAFETY: checked above, writable by the caller's word.
    unsafe { hand_out_shared(out, current.load().into_arc()) };
    Ok(())
}

/// Makes a slot that holds `probe`.
///
/// `*slot` receives a handle that the caller frees with `emaudit_probe_slot_free`; `probe` remains the caller's
/// and may be freed before it.
///
/// Errors: INVALID_ARGUMENT. Threads: any. Allocates.
///
/// # Safety
/// `probe` is a live handle; `slot` is valid for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_slot_new(
    probe: *const emaudit_probe,
    slot: *mut *mut emaudit_probe_slot,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || unsafe { make(probe, "probe", slot, |current| emaudit_probe_slot { current }) };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Puts `probe` in the place of the one before. Whoever acquires from now on gets the new one; whoever holds the
/// old one keeps it, whole, until freeing it. `probe` remains the caller's and may be freed.
///
/// Errors: INVALID_ARGUMENT. Threads: any, while others acquire and replace.
///
/// # Safety
/// `slot` and `probe` are live handles; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_slot_replace(
    slot: *const emaudit_probe_slot,
    probe: *const emaudit_probe,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let slot = unsafe { borrow(slot, "slot")? };
        slot.current.replace(unsafe { share(probe, "probe")? });
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Gives the probe of this moment.
///
/// `*probe` receives a handle of the caller's own, which is freed with `emaudit_probe_free` as any other, by
/// whichever thread, before or after the slot. The last free of a replaced probe releases its memory.
///
/// Errors: INVALID_ARGUMENT. Threads: any, while others acquire and replace. Takes no lock and waits for nobody;
/// allocates nothing, save once in each thread, at its first acquire.
///
/// # Safety
/// `slot` is a live handle; `probe` is valid for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_slot_acquire(
    slot: *const emaudit_probe_slot,
    probe: *mut *mut emaudit_probe,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || unsafe { acquire(&borrow(slot, "slot")?.current, probe, "probe") };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Frees a slot. NULL is fine. Acquired probes live on.
///
/// # Safety
/// `slot` is NULL or a handle that was not freed and that no other thread uses; it is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_probe_slot_free(slot: *mut emaudit_probe_slot) {
    // SAFETY: handles are made by `hand_out`.
    unsafe { take_back(slot) };
}

/// Makes a slot that holds `steering`.
///
/// `*slot` receives a handle that the caller frees with `emaudit_steering_slot_free`; `steering` remains the
/// caller's and may be freed before it.
///
/// Errors: INVALID_ARGUMENT. Threads: any. Allocates.
///
/// # Safety
/// `steering` is a live handle; `slot` is valid for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_steering_slot_new(
    steering: *const emaudit_steering,
    slot: *mut *mut emaudit_steering_slot,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || unsafe { make(steering, "steering", slot, |current| emaudit_steering_slot { current }) };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Puts `steering` in the place of the one before, as `emaudit_probe_slot_replace` does.
///
/// Errors: INVALID_ARGUMENT. Threads: any, while others acquire and replace.
///
/// # Safety
/// `slot` and `steering` are live handles; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_steering_slot_replace(
    slot: *const emaudit_steering_slot,
    steering: *const emaudit_steering,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || {
        let slot = unsafe { borrow(slot, "slot")? };
        slot.current.replace(unsafe { share(steering, "steering")? });
        Ok(())
    };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Gives the steering of this moment, as `emaudit_probe_slot_acquire` gives a probe; it is freed with
/// `emaudit_steering_free`.
///
/// Errors: INVALID_ARGUMENT. Threads: any, while others acquire and replace. Takes no lock and waits for nobody;
/// allocates nothing, save once in each thread, at its first acquire.
///
/// # Safety
/// `slot` is a live handle; `steering` is valid for writing; `error` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_steering_slot_acquire(
    slot: *const emaudit_steering_slot,
    steering: *mut *mut emaudit_steering,
    error: *mut *mut emaudit_error,
) -> emaudit_status {
    let body = || unsafe { acquire(&borrow(slot, "slot")?.current, steering, "steering") };
    // SAFETY: by the contract above.
    unsafe { guard(error, body) }
}

/// Frees a slot. NULL is fine. Acquired steerings live on.
///
/// # Safety
/// `slot` is NULL or a handle that was not freed and that no other thread uses; it is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emaudit_steering_slot_free(slot: *mut emaudit_steering_slot) {
    // SAFETY: handles are made by `hand_out`.
    unsafe { take_back(slot) };
}
