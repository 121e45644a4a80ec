//! What every function of the C ABI does before and after its own work: catch panics, check pointers,
//! and read and write structs whose size the other side states.

use super::error::{emaudit_error, emaudit_status};
use crate::error::{Error, Result, Status};
use std::any::Any;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Largest `struct_size` believed: anything above is an uninitialised field, not a future version.
const STRUCT_SIZE_CAP: usize = 4096;

/// Runs `body`, turns its error or panic into a status, and hands the sentence to `error` if there is one.
///
/// # Safety
/// `error` is null or valid for writing one pointer.
pub(super) unsafe fn guard(
    error: *mut *mut emaudit_error,
    body: impl FnOnce() -> Result<()>,
) -> emaudit_status {
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| Err(describe_panic(payload)));
    let failure = outcome.err();
    let status = failure.as_ref().map_or(Status::Ok, Error::status);
    if !error.is_null() {
        let handle = failure.map_or(std::ptr::null_mut(), emaudit_error::boxed);
        // SAFETY: the caller vouches for a non-null `error`.
        unsafe { error.write(handle) };
    }
    status as emaudit_status
}

/// Runs `body` where no status can be returned (the `_free` functions); a panic inside is swallowed.
pub(super) fn guard_void(body: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(body)) {
        std::mem::forget(payload);
    }
}

fn describe_panic(payload: Box<dyn Any + Send>) -> Error {
    let message = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "a panic without a message".to_owned(),
    };
    // Dropping a foreign payload could panic again, this time without anyone to catch it.
    std::mem::forget(payload);
    Error::Panic(message)
}

/// An [`Error::InvalidArgument`] with this text.
pub(super) fn invalid(text: impl Into<String>) -> Error {
    Error::InvalidArgument(text.into())
}

/// Borrows a handle or a struct.
///
/// # Safety
/// A non-null `pointer` refers to a live `T` that nobody mutates during `'a`.
pub(super) unsafe fn borrow<'a, T>(pointer: *const T, name: &str) -> Result<&'a T> {
    check_pointer(pointer, name)?;
    // SAFETY: not null, aligned, and live by the caller's word.
    Ok(unsafe { &*pointer })
}

/// Borrows a handle exclusively.
///
/// # Safety
/// A non-null `pointer` refers to a live `T` that nobody else uses during `'a`.
pub(super) unsafe fn borrow_mut<'a, T>(pointer: *mut T, name: &str) -> Result<&'a mut T> {
    check_pointer(pointer, name)?;
    // SAFETY: not null, aligned, and exclusive by the caller's word.
    Ok(unsafe { &mut *pointer })
}

/// Refuses a pointer that is null or not aligned for `T`.
pub(super) fn check_pointer<T>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(invalid(format!("{name} is NULL")));
    }
    if !pointer.is_aligned() {
        return Err(invalid(format!("{name} is not aligned to {} bytes", align_of::<T>())));
    }
    Ok(())
}

/// Refuses a NULL, misaligned or impossibly long array; `len == 0` ignores the pointer.
pub(super) fn check_array<T>(pointer: *const T, len: usize, name: &str) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    check_pointer(pointer, name)?;
    match len.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(invalid(format!("{name} has an impossible length of {len}"))),
    }
}

/// Borrows `len` elements; `len == 0` ignores the pointer.
///
/// # Safety
/// Unless `len` is 0, a non-null `pointer` is valid for reading `len` initialised elements during `'a`.
pub(super) unsafe fn slice<'a, T>(pointer: *const T, len: usize, name: &str) -> Result<&'a [T]> {
    check_array(pointer, len, name)?;
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: not null, aligned, of possible length; valid by the caller's word.
    Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
}

/// Borrows every handle of an array; `len == 0` ignores the pointer.
///
/// # Safety
/// Unless `len` is 0, a non-null `pointers` is valid for reading `len` pointers, each of which is null or refers to a
/// live `T`; nobody changes the array or the `T` during `'a`.
pub(super) unsafe fn borrow_all<'a, T>(
    pointers: *const *const T,
    len: usize,
    name: &str,
) -> Result<&'a [&'a T]> {
    let given = unsafe { slice(pointers, len, name)? };
    if let Some(bad) = given.iter().position(|one| one.is_null() || !one.is_aligned()) {
        check_pointer(given[bad], &format!("{name}[{bad}]"))?;
    }
    // SAFETY: as above; none is null or misaligned, and a reference is laid out as a pointer.
    unsafe { slice(pointers.cast::<&T>(), len, name) }
}

/// Borrows `len` elements for writing; `len == 0` ignores the pointer.
///
/// # Safety
/// Unless `len` is 0, a non-null `pointer` is valid for writing `len` elements and nobody else uses them
/// during `'a`. `T` is plain data.
pub(super) unsafe fn slice_mut<'a, T>(pointer: *mut T, len: usize, name: &str) -> Result<&'a mut [T]> {
    check_array(pointer.cast_const(), len, name)?;
    if len == 0 {
        return Ok(&mut []);
    }
    // SAFETY: not null, aligned, of possible length; valid and exclusive by the caller's word.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, len) })
}

/// Copies as much of `values` as fits and reports how many there are.
///
/// # Safety
/// `count` is valid for writing; unless `capacity` is 0, `pointer` is valid for writing `capacity` elements.
pub(super) unsafe fn copy_list<T: Copy>(
    values: &[T],
    pointer: *mut T,
    capacity: usize,
    count: *mut usize,
    name: &str,
) -> Result<()> {
    check_pointer(count.cast_const(), "count")?;
    let target = unsafe { slice_mut(pointer, capacity, name)? };
    let fitting = capacity.min(values.len());
    target[..fitting].copy_from_slice(&values[..fitting]);
    // SAFETY: checked above, writable by the caller's word.
    unsafe { count.write(values.len()) };
    Ok(())
}

/// Reads a NUL-terminated UTF-8 string.
///
/// # Safety
/// A non-null `pointer` refers to a NUL-terminated string that lives and stays unchanged during `'a`.
pub(super) unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str> {
    check_pointer(pointer, name)?;
    // SAFETY: not null, terminated by the caller's word.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|_| invalid(format!("{name} is not UTF-8")))
}

/// A flag that travels as an integer: 0 or 1, anything else is refused.
pub(super) fn flag(value: u32, name: &str) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(invalid(format!("{name} is {other}; it must be 0 or 1"))),
    }
}

/// Gives a new handle to the caller.
///
/// # Safety
/// `out` was checked with [`check_pointer`] and is valid for writing.
pub(super) unsafe fn hand_out<T>(out: *mut *mut T, value: T) {
    // SAFETY: by the caller's word.
    unsafe { out.write(Box::into_raw(Box::new(value))) };
}

/// Takes a handle back and drops it; null is fine.
///
/// # Safety
/// A non-null `pointer` came from [`hand_out`] and is not used again.
pub(super) unsafe fn take_back<T>(pointer: *mut T) {
    if !pointer.is_null() {
        // SAFETY: it came from `Box::into_raw`, once.
        guard_void(|| drop(unsafe { Box::from_raw(pointer) }));
    }
}

/// Gives one share of a handle to the caller; each share is taken back once, by whichever thread.
///
/// # Safety
/// As [`hand_out`].
pub(super) unsafe fn hand_out_shared<T>(out: *mut *mut T, value: Arc<T>) {
    // SAFETY: by the caller's word.
    unsafe { out.write(Arc::into_raw(value).cast_mut()) };
}

/// One more share of a handle that [`hand_out_shared`] gave.
///
/// # Safety
/// A non-null `pointer` came from [`hand_out_shared`] and is not taken back during the call.
pub(super) unsafe fn share<T>(pointer: *const T, name: &str) -> Result<Arc<T>> {
    check_pointer(pointer, name)?;
    // SAFETY: it came from `Arc::into_raw`, and the caller's share keeps it alive.
    unsafe {
        Arc::increment_strong_count(pointer);
        Ok(Arc::from_raw(pointer))
    }
}

/// Takes one share back and drops it, and with the last one the value; null is fine.
///
/// # Safety
/// A non-null `pointer` came from [`hand_out_shared`], and this share of it is not used again.
pub(super) unsafe fn take_back_shared<T>(pointer: *const T) {
    if !pointer.is_null() {
        // SAFETY: it came from `Arc::into_raw`, once for each share.
        guard_void(|| drop(unsafe { Arc::from_raw(pointer) }));
    }
}

/// A struct of the ABI that begins with `uint32_t struct_size` and grows at its end only.
///
/// # Safety
/// The type is `repr(C)`, begins with a `u32` that holds the size, has no padding, and every bit pattern of
/// it is valid.
pub(super) unsafe trait Sized32: Copy {
    /// The C name, for messages.
    const NAME: &'static str;
    /// Size of the first published version; anything smaller was never valid.
    const FIRST_SIZE: usize;
    /// The values of fields that an older caller does not have; `struct_size` is this version's size.
    fn defaults() -> Self;
}

/// Size the caller states, checked against the first version and the cap.
///
/// # Safety
/// A non-null `pointer` is valid for reading its first four bytes.
unsafe fn stated_size<T: Sized32>(pointer: *const T) -> Result<usize> {
    check_pointer(pointer, T::NAME)?;
    // SAFETY: every such struct begins with the size.
    let size = unsafe { pointer.cast::<u32>().read() } as usize;
    if size < T::FIRST_SIZE || size > STRUCT_SIZE_CAP {
        return Err(invalid(format!(
            "{}.struct_size is {size}, outside {}..={STRUCT_SIZE_CAP}; start from its _INIT macro",
            T::NAME,
            T::FIRST_SIZE
        )));
    }
    Ok(size)
}

/// Reads a struct of any published size. An older caller's missing fields get their defaults; bytes that
/// this version does not know must be zero, so that nothing the caller asked for is silently ignored.
///
/// # Safety
/// A non-null `pointer` is valid for reading the number of bytes its `struct_size` states.
pub(super) unsafe fn read_struct<T: Sized32>(pointer: *const T) -> Result<T> {
    let size = unsafe { stated_size(pointer)? };
    let known = size.min(size_of::<T>());
    // SAFETY: the caller vouches for `size` bytes.
    let tail = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known) };
    if tail.iter().any(|byte| *byte != 0) {
        return Err(invalid(format!("{} asks for something this version does not know", T::NAME)));
    }
    let mut value = T::defaults();
    // SAFETY: `known` fits both sides; `T` is plain data.
    unsafe { std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    Ok(value)
}

/// As [`read_struct`], where null means the defaults.
///
/// # Safety
/// As [`read_struct`].
pub(super) unsafe fn read_struct_or_default<T: Sized32>(pointer: *const T) -> Result<T> {
    if pointer.is_null() { Ok(T::defaults()) } else { unsafe { read_struct(pointer) } }
}

/// A checked place for a result struct, written once the result is known.
pub(super) struct OutStruct<T> {
    pointer: *mut T,
    size: usize,
}

impl<T: Sized32> OutStruct<T> {
    /// Checks pointer and size before any work is done.
    ///
    /// # Safety
    /// A non-null `pointer` is valid for reading and writing the number of bytes its `struct_size` states,
    /// for as long as the value lives.
    pub(super) unsafe fn new(pointer: *mut T) -> Result<Self> {
        let size = unsafe { stated_size(pointer.cast_const())? };
        Ok(OutStruct { pointer, size })
    }

    /// As [`OutStruct::new`], where null means that the result is not wanted.
    ///
    /// # Safety
    /// As [`OutStruct::new`].
    pub(super) unsafe fn new_optional(pointer: *mut T) -> Result<Option<Self>> {
        if pointer.is_null() { Ok(None) } else { unsafe { Self::new(pointer) }.map(Some) }
    }

    /// All that [`OutStruct::write`] writes to, by the caller's size of it; nothing where the result is not wanted.
    pub(super) fn region(name: &'static str, out: &Option<Self>) -> Region {
        let (pointer, size) =
            out.as_ref().map_or((std::ptr::null(), 0), |o| (o.pointer.cast_const(), o.size));
        Region::new(name, pointer.cast::<u8>(), size)
    }

    /// Writes the fields the caller has; bytes of a newer caller that this version does not know become 0.
    /// `struct_size` keeps the caller's value.
    pub(super) fn write(self, value: T) {
        let known = self.size.min(size_of::<T>());
        let target = self.pointer.cast::<u8>();
        let source = (&raw const value).cast::<u8>();
        // SAFETY: `new` was promised `size` writable bytes; `T` is plain data without padding.
        unsafe {
            std::ptr::copy_nonoverlapping(source.add(4), target.add(4), known - 4);
            target.add(known).write_bytes(0, self.size - known);
        }
    }
}

/// The memory an argument occupies, to refuse arguments that overlap.
#[derive(Clone, Copy)]
pub(super) struct Region {
    name: &'static str,
    start: usize,
    end: usize,
}

impl Region {
    /// `len` elements at `pointer`; a null pointer or zero elements occupy nothing.
    pub(super) fn new<T>(name: &'static str, pointer: *const T, len: usize) -> Self {
        let bytes = if pointer.is_null() { 0 } else { len.saturating_mul(size_of::<T>()) };
        Region { name, start: pointer.addr(), end: pointer.addr().saturating_add(bytes) }
    }
}

/// Refuses arguments of which one is written and another shares its memory.
pub(super) fn check_disjoint(written: &[Region], read: &[Region]) -> Result<()> {
    for (index, one) in written.iter().enumerate() {
        for other in written[index + 1..].iter().chain(read) {
            if one.start.max(other.start) < one.end.min(other.end) {
                return Err(invalid(format!("{} and {} overlap", one.name, other.name)));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "boundary_tests.rs"]
mod tests;
