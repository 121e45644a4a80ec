//! What is asked of the driver, by one that records it.

use super::*;
use crate::Status;
use crate::kernel::cuda::launch::THREADS;
use crate::steering::{Operation, SteeringOptions};
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_char, c_int, c_uint};

thread_local! {
    static LOG: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    static CONTEXT: Cell<usize> = const { Cell::new(0) };
    /// The function that fails, and with what.
    static FAILS: Cell<(&'static str, c_int)> = const { Cell::new(("", 0)) };
}

fn log(call: &'static str, line: String) -> c_int {
    LOG.with_borrow_mut(|log| log.push(line));
    let (name, status) = FAILS.get();
    if name == call { status } else { 0 }
}

fn taken() -> Vec<String> {
    LOG.with_borrow_mut(std::mem::take)
}

unsafe extern "C" fn init(_: c_uint) -> c_int {
    log("init", "init".into())
}

unsafe extern "C" fn current(context: *mut Handle) -> c_int {
    unsafe { context.write(CONTEXT.get() as Handle) };
    log("current", "current".into())
}

unsafe extern "C" fn context_id(context: Handle, id: *mut u64) -> c_int {
    let another = if FAILS.get().0 == "another" { 1 } else { 0 };
    unsafe { id.write(context.addr() as u64 + 1000 + another) };
    log("id", format!("id of {}", context.addr()))
}

unsafe extern "C" fn push(context: Handle) -> c_int {
    log("push", format!("push {}", context.addr()))
}

unsafe extern "C" fn pop(_: *mut Handle) -> c_int {
    log("pop", "pop".into())
}

unsafe extern "C" fn synchronize() -> c_int {
    log("synchronize", "synchronize".into())
}

unsafe extern "C" fn load(module: *mut Handle, ptx: *const c_void) -> c_int {
    let text = unsafe { CStr::from_ptr(ptx.cast()) }.to_str().unwrap();
    assert!(text.contains(".visible .entry score_f32(") || !cfg!(feature = "cuda"));
    unsafe { module.write(77 as Handle) };
    log("load", "load".into())
}

unsafe extern "C" fn unload(module: Handle) -> c_int {
    log("unload", format!("unload {}", module.addr()))
}

unsafe extern "C" fn function(function: *mut Handle, module: Handle, name: *const c_char) -> c_int {
    assert_eq!(module.addr(), 77);
    // The name stands for the function.
    let name = unsafe { CStr::from_ptr(name) }.to_owned();
    unsafe { function.write(name.into_raw().cast()) };
    log("function", "function".into())
}

unsafe extern "C" fn attribute(value: *mut c_int, which: c_int, _: Handle) -> c_int {
    assert_eq!(which, 0);
    unsafe { value.write(if FAILS.get().0 == "small" { 128 } else { 1024 }) };
    log("attribute", "attribute".into())
}

unsafe extern "C" fn allocate(address: *mut u64, bytes: usize) -> c_int {
    unsafe { address.write(0x10_0000) };
    log("allocate", format!("allocate {bytes}"))
}

unsafe extern "C" fn free(address: u64) -> c_int {
    log("free", format!("free {address:#x}"))
}

unsafe extern "C" fn upload(to: u64, from: *const c_void, bytes: usize) -> c_int {
    let values = unsafe { std::slice::from_raw_parts(from.cast::<f32>(), bytes / 4) };
    log("upload", format!("upload {to:#x} {values:?}"))
}

#[allow(clippy::too_many_arguments)] // cuda.h's
unsafe extern "C" fn launch(
    function: Handle,
    x: c_uint,
    y: c_uint,
    z: c_uint,
    threads: c_uint,
    ty: c_uint,
    tz: c_uint,
    shared: c_uint,
    stream: Handle,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> c_int {
    assert_eq!((y, z, threads, ty, tz, shared), (1, 1, THREADS as c_uint, 1, 1, 0));
    assert!(extra.is_null());
    let name = unsafe { CStr::from_ptr(function.cast()) }.to_str().unwrap();
    // Memory comes first, and each of it is an address.
    let memory = if name.starts_with("score") { 4 } else { 6 };
    let value = |i| unsafe { (*parameters.add(i)).cast::<u64>().read() };
    let addresses: Vec<String> = (0..memory).map(|i| format!("{:#x}", value(i))).collect();
    let small = |i: usize| unsafe { (*parameters.add(memory + i)).cast::<u32>().read() };
    let (rows, width, stride, team) = (small(0), small(1), value(memory + 2), small(3));
    log(
        "launch",
        format!("{name} x {x} on {} at {addresses:?}: {rows} x {width} / {stride}, {team}", stream.addr()),
    )
}

unsafe extern "C" fn name(status: c_int, name: *mut *const c_char) -> c_int {
    let text = if status == 700 { c"CUDA_ERROR_ILLEGAL_ADDRESS".as_ptr() } else { std::ptr::null() };
    unsafe { name.write(text) };
    0
}

fn driver() -> &'static Driver {
    Box::leak(Box::new(Driver {
        init,
        current,
        context_id,
        push,
        pop,
        synchronize,
        load,
        unload,
        function,
        attribute,
        allocate,
        free,
        upload,
        launch,
        name,
        _library: None,
    }))
}

fn probe() -> Probe {
    Probe::from_vectors(&[0.0, 3.0, 4.0], &[1.0, 1.0, 1.0], 0.5, None).unwrap()
}

fn steering(probe: &Probe, operation: Operation) -> Steering {
    let options = SteeringOptions { allow_nonspecific: true, ..SteeringOptions::new(operation) };
    Steering::new(probe, options).unwrap()
}

fn rows(address: u64, count: usize) -> DeviceRows {
    // SAFETY: of a driver that touches no memory; so below.
    unsafe { DeviceRows::from_raw(address, Dtype::Bf16, count, 3, 8) }.unwrap()
}

fn array<T>(address: u64, len: usize) -> DeviceSlice<T> {
    unsafe { DeviceSlice::from_raw(address, len) }.unwrap()
}

fn stream() -> DeviceStream {
    unsafe { DeviceStream::from_raw(5 as Handle) }
}

#[test]
fn setting_up_loads_once_and_calls_only_launch() {
    CONTEXT.set(42);
    let (driver, probe) = (driver(), probe());
    let on_device = DeviceProbe::with_driver(&probe, driver).unwrap();
    let mut expected = vec!["current".to_owned(), "id of 42".into(), "load".into()];
    expected.extend((0..12).flat_map(|_| ["function".to_owned(), "attribute".into()]));
    expected.push("allocate 64".into());
    // The unit direction and the raw one, each filled up to eight.
    let vectors = "[0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0]";
    expected.extend([format!("upload 0x100000 {vectors}"), "synchronize".into()]);
    assert_eq!(taken(), expected);

    // The kernels are there: another probe brings its direction alone.
    let another = DeviceProbe::with_driver(&probe, driver).unwrap();
    assert_eq!(taken().iter().filter(|line| *line == "load" || *line == "function").count(), 0);

    on_device.score(&rows(0x2000, 9), ScoreUnit::Raw, array(0x3000, 9), None, stream()).unwrap();
    let line = r#"score_bf16 x 3 on 5 at ["0x2000", "0x100000", "0x3000", "0x0"]: 9 x 3 / 8, 64"#;
    assert_eq!(taken(), [line]);
    for (operation, vector) in
        [(Operation::Subtract { alpha: 1.0 }, "0x100020"), (Operation::ProjectOut { alpha: 1.0 }, "0x100000")]
    {
        let steering = steering(&probe, operation);
        let scores = Some((ScoreUnit::AlignedSd, array(0x3000, 1)));
        on_device.steer(&steering, &rows(0x2000, 1), scores, None, array(0x4000, 1), stream()).unwrap();
        let memory = format!(r#"["0x2000", "0x100000", "{vector}", "0x0", "0x3000", "0x4000"]"#);
        assert_eq!(taken(), [format!("steer_bf16 x 1 on 5 at {memory}: 1 x 3 / 8, 64")]);
    }
    let steering = steering(&probe, Operation::Subtract { alpha: 1.0 });
    on_device.steer(&steering, &rows(0, 0), None, None, array(0, 0), stream()).unwrap();
    assert!(taken().is_empty(), "no rows, no launch");

    // Whatever is current by then, things are freed where they were made; the kernels go last.
    CONTEXT.set(0);
    drop((on_device, another));
    let free = ["push 42", "id of 42", "free 0x100000", "pop"];
    let expected = [&free[..], &free[..], &["push 42", "id of 42", "unload 77", "pop"]].concat();
    assert_eq!(taken(), expected);
}

#[test]
fn contexts_have_their_own_kernels() {
    let (driver, probe) = (driver(), probe());
    CONTEXT.set(1);
    let one = DeviceProbe::with_driver(&probe, driver).unwrap();
    CONTEXT.set(2);
    let two = DeviceProbe::with_driver(&probe, driver).unwrap();
    assert_eq!(taken().iter().filter(|line| *line == "load").count(), 2);
    // A context that is gone has taken its memory along.
    FAILS.set(("push", 709));
    drop((one, two));
    assert!(taken().iter().all(|line| line.starts_with("push")));
    FAILS.set(("", 0));
    // And where another context has its address, nothing of that one is touched.
    let three = DeviceProbe::with_driver(&probe, driver).unwrap();
    taken();
    FAILS.set(("another", 0));
    drop(three);
    assert_eq!(taken(), ["push 2", "id of 2", "pop", "push 2", "id of 2", "pop"]);
    FAILS.set(("", 0));
}

#[test]
fn bad_arguments_launch_nothing() {
    CONTEXT.set(3);
    let (driver, probe) = (driver(), probe());
    let on_device = DeviceProbe::with_driver(&probe, driver).unwrap();
    taken();
    let refused = |result: Result<()>| {
        assert!(taken().is_empty());
        result.unwrap_err().status()
    };
    let wide = unsafe { DeviceRows::from_raw(0x2000, Dtype::F32, 1, 4, 4) }.unwrap();
    let (raw, invalid) = (ScoreUnit::Raw, Status::InvalidArgument);
    assert_eq!(refused(on_device.score(&wide, raw, array(0x3000, 1), None, stream())), Status::WidthMismatch);
    assert_eq!(refused(on_device.score(&rows(0x2000, 2), raw, array(0x3000, 1), None, stream())), invalid);
    let short = Some(array(0x4000, 1));
    assert_eq!(refused(on_device.score(&rows(0x2000, 2), raw, array(0x3000, 2), short, stream())), invalid);

    let own = steering(&probe, Operation::Subtract { alpha: 1.0 });
    let steer = |steering: &Steering, strengths, status| {
        refused(on_device.steer(steering, &rows(0x2000, 2), None, strengths, array(0x5000, status), stream()))
    };
    assert_eq!(steer(&own, Some(array(0x4000, 1)), 2), invalid);
    assert_eq!(steer(&own, None, 1), invalid);
    // Equal values, but another probe: what lies on the GPU is not what it was made from.
    let other = Probe::from_vectors(probe.direction(), &[1.0, 1.0, 1.0], 0.5, None).unwrap();
    assert_eq!(steer(&steering(&other, Operation::Subtract { alpha: 1.0 }), None, 2), invalid);

    let of = |address, rows, cols, stride| unsafe {
        DeviceRows::from_raw(address, Dtype::F16, rows, cols, stride).map(drop)
    };
    assert!(of(0, 0, 3, 0).is_ok() && of(0x2000, 1, 3, 0).is_ok());
    for bad in [of(0, 1, 3, 3), of(0x2001, 1, 3, 3), of(0x2000, 2, 3, 2), of(0x2000, usize::MAX, 3, 3)] {
        assert_eq!(refused(bad), invalid);
    }
    assert_eq!(refused(unsafe { DeviceSlice::<f32>::from_raw(0x3002, 1) }.map(drop)), invalid);
}

#[test]
fn what_the_driver_refuses_is_said_in_its_words() {
    CONTEXT.set(0);
    let (driver, probe) = (driver(), probe());
    let no_context = DeviceProbe::with_driver(&probe, driver).unwrap_err();
    assert!(no_context.to_string().contains("no CUDA context is current"), "{no_context}");

    CONTEXT.set(4);
    for call in ["current", "id", "load", "function", "attribute", "allocate", "upload", "synchronize"] {
        FAILS.set((call, 700));
        taken();
        let error = DeviceProbe::with_driver(&probe, driver).unwrap_err();
        assert_eq!(error.status(), Status::Device);
        assert!(error.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
        // What had been made is gone again.
        let log = taken();
        let count = |what: &str| log.iter().filter(|line| line.starts_with(what)).count();
        assert_eq!(count("free"), usize::from(matches!(call, "upload" | "synchronize")), "{call}");
        assert_eq!(count("unload"), usize::from(!matches!(call, "current" | "id" | "load")), "{call}");
    }
    FAILS.set(("small", 0));
    assert_eq!(DeviceProbe::with_driver(&probe, driver).unwrap_err().status(), Status::DeviceUnavailable);
    FAILS.set(("", 0));
    let on_device = DeviceProbe::with_driver(&probe, driver).unwrap();
    FAILS.set(("launch", 1));
    let error = on_device.score(&rows(0x2000, 1), ScoreUnit::Raw, array(0x3000, 1), None, stream());
    assert_eq!(
        error.unwrap_err().to_string(),
        "the GPU's driver answers CUDA error 1 when asked to launch a kernel"
    );
    FAILS.set(("push", 1));
    drop(on_device);
    FAILS.set(("", 0));
}

#[test]
fn without_a_driver_that_is_said() {
    match Driver::of_this_machine() {
        Ok(_) => println!("this machine has a driver"),
        Err(error) => {
            assert_eq!(error.status(), Status::DeviceUnavailable);
            let error = DeviceProbe::new(&probe()).unwrap_err();
            assert_eq!(error.status() as i32, 23);
            assert!(error.to_string().contains("host memory"), "{error}");
        }
    }
}
