//! bf16 matrix products by oneDNN, found at run time and never required.
//!
//! The library is loaded when a recipe asks for bf16. Its C interface is declared here as far as it is used, for the
//! major versions 2 and 3. The threads are those of this program: oneDNN's own would wait beside them.

mod columns;

pub use columns::Columns;

use crate::model::product::{Matrix, Threads};
use anyhow::{Context, Result, bail};
use half::bf16;
use libloading::Library;
use rayon::prelude::*;
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{OsStr, c_int, c_uint, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex};

/// Names under which it is looked for, in this order.
const NAMES: [&str; 3] = ["libdnnl.so.3", "libdnnl.so.2", "libdnnl.so"];
/// Products that are kept prepared. A run has some dozens; lengths that change all the time make new ones.
const KEPT: usize = 1024;

/// Columns per thread from which on a product is shared out by columns.
const LEAST_COLUMNS: usize = 64;
/// Parts begin at multiples of this.
const ROUND: usize = 16;

thread_local! {
    /// Room that products of this thread work in.
    static SCRATCH: Cell<Vec<u64>> = const { Cell::new(Vec::new()) };
}

/// Status of a call, 0 for success.
type Status = c_int;
type Handle = *mut c_void;

const CPU: c_int = 1;
const IN_ORDER: c_uint = 1;
const BF16: c_int = 2;
const F32: c_int = 3;
const SCRATCHPAD_BY_USER: c_int = 1;
const QUERY_SCRATCHPAD: c_int = 136;
/// Matrix tiles with products of bf16.
const ISA_TILES: c_int = 0x3e7;
/// AVX-512 with products of bf16, among the instruction sets of oneDNN.
const ISA_BF16: c_int = 0xe7;
const SOURCE: c_int = 1;
const DESTINATION: c_int = 17;
const WEIGHTS: c_int = 33;
const SCRATCHPAD: c_int = 80;

/// `dnnl_version_t`.
#[repr(C)]
struct Version {
    major: c_int,
    minor: c_int,
    patch: c_int,
}

/// `dnnl_exec_arg_t`.
#[repr(C)]
struct Argument {
    name: c_int,
    memory: Handle,
}

/// Room for a `dnnl_memory_desc_t` (696 bytes) or a `dnnl_matmul_desc_t` (2800 bytes) of version 2, with some to spare.
#[repr(C, align(16))]
struct Room([u8; 8192]);

impl Room {
    fn new() -> Box<Self> {
        Box::new(Room([0; 8192]))
    }
}

/// Fixed length of the arrays of dimensions.
type Dims = [i64; 12];

/// A memory descriptor: version 2 fills the caller's structure, version 3 gives a handle.
enum Descriptor {
    Two(Box<Room>),
    Three(Handle),
}

impl Descriptor {
    fn pointer(&self) -> *const c_void {
        match self {
            Descriptor::Two(room) => room.0.as_ptr().cast(),
            Descriptor::Three(handle) => *handle,
        }
    }
}

/// The shape of a product, its operands and where its result goes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dims: [usize; 3],
    lhs: (usize, usize),
    rhs: (usize, usize),
    row_stride: usize,
    kind: c_int,
    add: bool,
}

/// What a product is kept in.
pub trait Sum: Copy + Default + Send + Sync {
    /// Its name for oneDNN.
    const KIND: c_int;
}

impl Sum for f32 {
    const KIND: c_int = F32;
}

impl Sum for bf16 {
    const KIND: c_int = BF16;
}

/// A prepared product.
struct Plan {
    library: Arc<Functions>,
    primitive: Handle,
    descriptors: [Descriptor; 3],
    scratchpad: Handle,
    /// Owns the scratchpad's descriptor.
    primitive_desc: Handle,
    scratch_bytes: usize,
}

// SAFETY: a primitive is not changed by running it, and with a scratchpad of the caller it may run on any thread and on
// several at once (oneDNN, "Primitive attributes: scratchpad"); the other handles are only read.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

macro_rules! functions {
    ($($name:ident: fn($($arg:ty),*) -> $ret:ty;)*) => {
        /// The functions of both major versions that are used, and the library that holds them.
        #[allow(non_snake_case)]
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) -> $ret,)*
            matmul: Matmul,
            set_threads: Option<unsafe extern "C" fn(c_int)>,
            major: c_int,
            _library: Library,
        }

        impl Functions {
            /// # Safety
            /// `library` must be oneDNN, version 2 or 3.
            unsafe fn of(library: Library) -> Result<Self> {
                // SAFETY: the caller vouches that the names have the types that oneDNN's headers give them.
                unsafe {
                    let version = library.get::<unsafe extern "C" fn() -> *const Version>(b"dnnl_version")?;
                    let major = (*version()).major;
                    Ok(Functions {
                        $($name: *library.get(concat!("dnnl_", stringify!($name)).as_bytes())?,)*
                        matmul: Matmul::of(&library, major)?,
                        set_threads: library.get(b"omp_set_num_threads").ok().map(|f| *f),
                        major,
                        _library: library,
                    })
                }
            }
        }
    };
}

functions! {
    get_effective_cpu_isa: fn() -> c_int;
    engine_create: fn(*mut Handle, c_int, usize) -> Status;
    stream_create: fn(*mut Handle, Handle, c_uint) -> Status;
    stream_wait: fn(Handle) -> Status;
    stream_destroy: fn(Handle) -> Status;
    primitive_attr_create: fn(*mut Handle) -> Status;
    primitive_attr_destroy: fn(Handle) -> Status;
    primitive_attr_set_scratchpad_mode: fn(Handle, c_int) -> Status;
    primitive_attr_set_post_ops: fn(Handle, Handle) -> Status;
    post_ops_create: fn(*mut Handle) -> Status;
    post_ops_destroy: fn(Handle) -> Status;
    primitive_desc_query_md: fn(Handle, c_int, c_int) -> *const c_void;
    memory_desc_get_size: fn(*const c_void) -> usize;
    primitive_create: fn(*mut Handle, Handle) -> Status;
    primitive_desc_destroy: fn(Handle) -> Status;
    primitive_destroy: fn(Handle) -> Status;
    memory_create: fn(*mut Handle, *const c_void, Handle, *mut c_void) -> Status;
    memory_destroy: fn(Handle) -> Status;
    primitive_execute: fn(Handle, Handle, c_int, *const Argument) -> Status;
}

type Descriptors = unsafe extern "C" fn(*mut c_void, c_int, *const i64, c_int, *const i64) -> Status;

/// What the major versions do differently.
enum Matmul {
    Two {
        describe: Descriptors,
        matmul: unsafe extern "C" fn(
            *mut c_void,
            *const c_void,
            *const c_void,
            *const c_void,
            *const c_void,
        ) -> Status,
        primitive_desc: unsafe extern "C" fn(*mut Handle, *const c_void, Handle, Handle, Handle) -> Status,
        append_sum: unsafe extern "C" fn(Handle, f32) -> Status,
    },
    Three {
        describe: Descriptors,
        forget: unsafe extern "C" fn(Handle) -> Status,
        #[allow(clippy::type_complexity)]
        primitive_desc: unsafe extern "C" fn(
            *mut Handle,
            Handle,
            *const c_void,
            *const c_void,
            *const c_void,
            *const c_void,
            Handle,
        ) -> Status,
        append_sum: unsafe extern "C" fn(Handle, f32, i32, c_int) -> Status,
    },
}

impl Matmul {
    /// # Safety
    /// As [`Functions::of`].
    unsafe fn of(library: &Library, major: c_int) -> Result<Self> {
        // SAFETY: the caller vouches for the types.
        unsafe {
            Ok(match major {
                2 => Matmul::Two {
                    describe: *library.get(b"dnnl_memory_desc_init_by_strides")?,
                    matmul: *library.get(b"dnnl_matmul_desc_init")?,
                    primitive_desc: *library.get(b"dnnl_primitive_desc_create")?,
                    append_sum: *library.get(b"dnnl_post_ops_append_sum")?,
                },
                3 => Matmul::Three {
                    describe: *library.get(b"dnnl_memory_desc_create_with_strides")?,
                    forget: *library.get(b"dnnl_memory_desc_destroy")?,
                    primitive_desc: *library.get(b"dnnl_matmul_primitive_desc_create")?,
                    append_sum: *library.get(b"dnnl_post_ops_append_sum")?,
                },
                other => bail!("version {other} of oneDNN is not known; 2 and 3 are"),
            })
        }
    }
}

fn done(what: &str, status: Status) -> Result<()> {
    if status != 0 {
        bail!("oneDNN: {what} ended with status {status}");
    }
    Ok(())
}

impl Functions {
    fn describe(&self, dims: (usize, usize), strides: (usize, usize), kind: c_int) -> Result<Descriptor> {
        let array = |(a, b): (usize, usize)| {
            let mut all: Dims = [0; 12];
            (all[0], all[1]) = (a as i64, b as i64);
            all
        };
        let (dims, strides) = (array(dims), array(strides));
        match self.matmul {
            Matmul::Two { describe, .. } => {
                let mut room = Room::new();
                let to = room.0.as_mut_ptr().cast();
                // SAFETY: `to` has room for the structure, the arrays have the fixed length.
                done("a memory descriptor", unsafe {
                    describe(to, 2, dims.as_ptr(), kind, strides.as_ptr())
                })?;
                Ok(Descriptor::Two(room))
            }
            Matmul::Three { describe, .. } => {
                let mut handle: Handle = null_mut();
                let to = (&raw mut handle).cast();
                // SAFETY: `to` takes one pointer, the arrays have the fixed length.
                done("a memory descriptor", unsafe {
                    describe(to, 2, dims.as_ptr(), kind, strides.as_ptr())
                })?;
                Ok(Descriptor::Three(handle))
            }
        }
    }

    fn forget(&self, descriptor: &Descriptor) {
        if let (Descriptor::Three(handle), Matmul::Three { forget, .. }) = (descriptor, &self.matmul) {
            // SAFETY: the handle came from the library and is given back once.
            unsafe { forget(*handle) };
        }
    }

    /// Attributes of a product: its scratchpad is the caller's, and with `add` it adds to what is there.
    fn attributes(&self, add: bool) -> Result<Handle> {
        let (mut attributes, mut after): (Handle, Handle) = (null_mut(), null_mut());
        // SAFETY: handles go to the functions of the library that made them; the operations are copied by the setter.
        unsafe {
            done("an attribute", (self.primitive_attr_create)(&mut attributes))?;
            done(
                "its scratchpad",
                (self.primitive_attr_set_scratchpad_mode)(attributes, SCRATCHPAD_BY_USER),
            )?;
            if add {
                done("an operation list", (self.post_ops_create)(&mut after))?;
                let summed = match self.matmul {
                    Matmul::Two { append_sum, .. } => append_sum(after, 1.0),
                    Matmul::Three { append_sum, .. } => append_sum(after, 1.0, 0, 0),
                };
                done("a sum", summed)?;
                done("its operations", (self.primitive_attr_set_post_ops)(attributes, after))?;
                (self.post_ops_destroy)(after);
            }
        }
        Ok(attributes)
    }
}

/// oneDNN, loaded.
pub struct Accelerator {
    functions: Arc<Functions>,
    engine: Handle,
    /// The processor multiplies tiles of matrices (AMX).
    tiles: bool,
    plans: Mutex<HashMap<Key, Arc<Plan>>>,
}

// SAFETY: an engine of the CPU has no state that calls would change; the plans lie behind a lock.
unsafe impl Send for Accelerator {}
// SAFETY: as above.
unsafe impl Sync for Accelerator {}

impl std::fmt::Debug for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "oneDNN {}", self.functions.major)
    }
}

impl Accelerator {
    /// Looks for the library where the system does, or opens the one that `EMAUDIT_ONEDNN` names.
    pub fn find() -> Result<Arc<Self>> {
        Self::open(std::env::var_os("EMAUDIT_ONEDNN").as_deref())
    }

    /// The library in a file, or the first that the system finds.
    pub fn open(file: Option<&OsStr>) -> Result<Arc<Self>> {
        let library = match file {
            // SAFETY: oneDNN's initialisers do not touch this program; what the user names is the user's to vouch for.
            Some(path) => unsafe { Library::new(path) }
                .with_context(|| format!("cannot load oneDNN from {}", path.display()))?,
            None => {
                // SAFETY: as above.
                let found = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
                found.with_context(|| {
                    format!(
                        "bf16 needs oneDNN, and none of {} was found: install it (Debian: libdnnl2 or libdnnl3), name \
                         its file in EMAUDIT_ONEDNN, or compute in f32 (finetune.compute, --compute)",
                        NAMES.join(", ")
                    )
                })?
            }
        };
        // SAFETY: the file goes by oneDNN's name, or the user says that it is oneDNN.
        let functions = unsafe { Functions::of(library) }.context("this library is not oneDNN")?;
        // SAFETY: it takes nothing.
        let isa = unsafe { (functions.get_effective_cpu_isa)() };
        if isa & ISA_BF16 != ISA_BF16 {
            bail!(
                "bf16 would not be faster here: oneDNN finds no bf16 products (AVX512_BF16) on this processor; \
                 compute in f32 (finetune.compute, --compute)"
            );
        }
        let tiles = isa & ISA_TILES == ISA_TILES;
        let mut engine: Handle = null_mut();
        // SAFETY: it writes one handle.
        done("an engine", unsafe { (functions.engine_create)(&mut engine, CPU, 0) })?;
        Ok(Arc::new(Accelerator { functions: Arc::new(functions), engine, tiles, plans: Mutex::default() }))
    }

    fn plan(&self, key: Key) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(|broken| broken.into_inner());
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.clone());
        }
        if plans.len() >= KEPT {
            plans.clear();
        }
        let plan = Arc::new(self.prepare(key)?);
        plans.insert(key, plan.clone());
        Ok(plan)
    }

    fn prepare(&self, key: Key) -> Result<Plan> {
        let f = &self.functions;
        let [m, n, k] = key.dims;
        let descriptors = [
            f.describe((m, k), key.lhs, BF16)?,
            f.describe((k, n), key.rhs, BF16)?,
            f.describe((m, n), (key.row_stride, 1), key.kind)?,
        ];
        let [lhs, rhs, dst] = [0, 1, 2].map(|i| descriptors[i].pointer());
        let attributes = f.attributes(key.add)?;
        let (mut primitive_desc, mut primitive): (Handle, Handle) = (null_mut(), null_mut());
        // SAFETY: descriptors and handles are alive, outputs are single handles, `room` holds the larger structure.
        let (scratchpad, scratch_bytes) = unsafe {
            let described = match f.matmul {
                Matmul::Two { matmul, primitive_desc: create, .. } => {
                    let mut room = Room::new();
                    let to: *mut c_void = room.0.as_mut_ptr().cast();
                    done("a product", matmul(to, lhs, rhs, null(), dst))?;
                    create(&mut primitive_desc, to, attributes, self.engine, null_mut())
                }
                Matmul::Three { primitive_desc: create, .. } => {
                    create(&mut primitive_desc, self.engine, lhs, rhs, null(), dst, attributes)
                }
            };
            done(&format!("a product of {m} x {k} and {k} x {n} in bf16"), described)?;
            (f.primitive_attr_destroy)(attributes);
            done("preparing a product", (f.primitive_create)(&mut primitive, primitive_desc))?;
            let scratchpad = (f.primitive_desc_query_md)(primitive_desc, QUERY_SCRATCHPAD, 0);
            (scratchpad, (f.memory_desc_get_size)(scratchpad))
        };
        Ok(Plan {
            library: f.clone(),
            primitive,
            descriptors,
            scratchpad: scratchpad.cast_mut(),
            primitive_desc,
            scratch_bytes,
        })
    }

    /// `dst = lhs rhs` or, with `add`, `dst += lhs rhs`, of bf16 values, summed in f32. Row i of the result begins at
    /// `i * row_stride` of `dst`.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn product(
        &self,
        dst: &mut [f32],
        row_stride: usize,
        add: bool,
        lhs: Matrix<'_, bf16>,
        rhs: Matrix<'_, bf16>,
        threads: Threads,
    ) -> Result<()> {
        let ((m, k), (depth, n)) = (lhs.dims(), rhs.dims());
        if m == 0 || n == 0 {
            return Ok(());
        }
        assert!(k == depth && k > 0, "inner dimensions {k} and {depth} of a product");
        assert!(n <= row_stride && (m - 1) * row_stride + n <= dst.len(), "the result does not fit");
        let place = Place(dst.as_mut_ptr());
        let threads = if threads == Threads::All { rayon::current_num_threads() } else { 1 };
        // By columns where there are enough: oneDNN reorders the right side in every call, so each thread takes its own
        // part of that side.
        let by_columns = n >= LEAST_COLUMNS * threads;
        let whole = if by_columns { n } else { m };
        let share = whole.div_ceil(threads).next_multiple_of(ROUND);
        (0..whole.div_ceil(share)).into_par_iter().try_for_each(|i| {
            let (first, count) = (i * share, share.min(whole - i * share));
            let (lhs, rhs, offset) = match by_columns {
                true => (lhs, rhs.columns(first, count), first),
                false => (lhs.rows(first, count), rhs, first * row_stride),
            };
            // SAFETY: the part lies inside `dst`, which is borrowed for this call; parts share no element.
            unsafe { self.part(place.at(offset), row_stride, add, lhs, rhs) }
        })
    }

    /// One thread's part of a product.
    ///
    /// # Safety
    /// Rows of the result, `row_stride` apart from `dst` on, must be writable and nobody else's.
    unsafe fn part<T: Sum>(
        &self,
        dst: *mut T,
        row_stride: usize,
        add: bool,
        lhs: Matrix<'_, bf16>,
        rhs: Matrix<'_, bf16>,
    ) -> Result<()> {
        if let Some(set_threads) = self.functions.set_threads {
            // SAFETY: OpenMP keeps the number for the calling thread alone.
            unsafe { set_threads(1) };
        }
        let dims = [lhs.dims().0, rhs.dims().1, lhs.dims().1];
        let key = Key { dims, lhs: lhs.strides(), rhs: rhs.strides(), row_stride, kind: T::KIND, add };
        let plan = self.plan(key)?;
        let [lhs, rhs] = [lhs.as_ptr(), rhs.as_ptr()].map(|p| p.cast_mut().cast());
        // SAFETY: `Matrix` holds its operands' elements in their slices, the caller vouches for the result.
        unsafe { plan.run(self.engine, [lhs, rhs, dst.cast()]) }
    }
}

/// Where a result goes, for threads that write parts of it.
struct Place<T>(*mut T);

impl<T> Place<T> {
    fn at(&self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

// SAFETY: each thread writes elements that no other thread touches.
unsafe impl<T> Send for Place<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Place<T> {}

impl Plan {
    /// Runs on operands that lie as the key says.
    ///
    /// # Safety
    /// Every element that the key speaks of must be readable, and those of the result writable and nobody else's.
    unsafe fn run(&self, engine: Handle, data: [*mut c_void; 3]) -> Result<()> {
        let f = &self.library;
        // Kept by the thread: fresh pages from the system cost as much as a small product. Cache lines are 64 bytes, and
        // oneDNN asks for no more.
        let mut scratch = SCRATCH.take();
        scratch.resize((self.scratch_bytes / 8 + 16).max(scratch.len()), 0);
        let begin = scratch.as_mut_ptr().cast::<u8>();
        let aligned = begin.wrapping_add(begin.align_offset(64)).cast::<c_void>();
        let [lhs, rhs, dst] = [0, 1, 2].map(|i| self.descriptors[i].pointer());
        let memories = [
            (SOURCE, lhs, data[0]),
            (WEIGHTS, rhs, data[1]),
            (DESTINATION, dst, data[2]),
            (SCRATCHPAD, self.scratchpad.cast_const(), aligned),
        ];
        let mut arguments = Vec::with_capacity(memories.len());
        let mut stream: Handle = null_mut();
        // SAFETY:
        // - the caller vouches for operands and result, which the descriptors describe as the key does;
        // - the scratchpad has the size that was asked for, beyond its alignment, and is this call's alone;
        // - the call has ended when `stream_wait` returns, and every handle made here is given back.
        unsafe {
            let mut status = (f.stream_create)(&mut stream, engine, IN_ORDER);
            for (name, descriptor, data) in memories {
                let mut memory: Handle = null_mut();
                if status == 0 {
                    status = (f.memory_create)(&mut memory, descriptor, engine, data);
                    arguments.push(Argument { name, memory });
                }
            }
            if status == 0 {
                status = (f.primitive_execute)(
                    self.primitive,
                    stream,
                    arguments.len() as c_int,
                    arguments.as_ptr(),
                );
            }
            if !stream.is_null() {
                (f.stream_wait)(stream);
                (f.stream_destroy)(stream);
            }
            for argument in arguments.iter().filter(|a| !a.memory.is_null()) {
                (f.memory_destroy)(argument.memory);
            }
            SCRATCH.set(scratch);
            done("a product", status)
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: the handles came from this library and are given back once.
        unsafe {
            (self.library.primitive_destroy)(self.primitive);
            (self.library.primitive_desc_destroy)(self.primitive_desc);
        }
        self.descriptors.iter().for_each(|d| self.library.forget(d));
    }
}
