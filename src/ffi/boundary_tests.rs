use super::*;

/// Version 1 of a struct, and version 2, which gained a field whose default is not zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
struct First {
    struct_size: u32,
    kept: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
struct Second {
    struct_size: u32,
    kept: u32,
    gained: u64,
}

unsafe impl Sized32 for First {
    const NAME: &'static str = "first";
    const FIRST_SIZE: usize = 8;
    fn defaults() -> Self {
        First { struct_size: 8, kept: 0 }
    }
}

unsafe impl Sized32 for Second {
    const NAME: &'static str = "second";
    const FIRST_SIZE: usize = 8;
    fn defaults() -> Self {
        Second { struct_size: 16, kept: 0, gained: 5 }
    }
}

#[test]
fn a_panic_becomes_a_status_with_its_message() {
    let mut error = std::ptr::null_mut();
    let status = unsafe { guard(&raw mut error, || panic!("row {} of {}", 3, 2)) };
    assert_eq!(status, Status::Panic as emaudit_status);
    let message = unsafe { CStr::from_ptr(super::super::error::emaudit_error_message(error)) };
    assert!(message.to_str().unwrap().contains("row 3 of 2"));
    unsafe { super::super::error::emaudit_error_free(error) };
    assert_eq!(unsafe { guard(std::ptr::null_mut(), || panic!("unseen")) }, Status::Panic as emaudit_status);
    guard_void(|| panic!("swallowed"));
}

#[test]
fn an_error_pointer_is_cleared_on_success() {
    let mut error = std::ptr::dangling_mut();
    assert_eq!(unsafe { guard(&raw mut error, || Ok(())) }, 0);
    assert!(error.is_null());
}

#[test]
fn an_older_struct_gets_the_defaults_of_newer_fields() {
    // Room for the newer struct, so that an over-read would find the poison and not fault.
    let stored = Second { struct_size: 8, kept: 7, gained: 99 };
    let read = unsafe { read_struct(&raw const stored) }.unwrap();
    assert_eq!((read.kept, read.gained), (7, 5));
}

#[test]
fn a_newer_struct_is_read_only_when_its_unknown_tail_is_zero() {
    let mut stored = Second { struct_size: 16, kept: 7, gained: 0 };
    let read = unsafe { read_struct((&raw const stored).cast::<First>()) }.unwrap();
    assert_eq!(read.kept, 7);
    stored.gained = 1 << 40;
    let refused = unsafe { read_struct((&raw const stored).cast::<First>()) }.unwrap_err();
    assert_eq!(refused.status(), Status::InvalidArgument);
}

#[test]
fn sizes_below_the_first_version_and_wild_sizes_are_refused() {
    for size in [0, 4, 7, 4097, u32::MAX] {
        let stored = First { struct_size: size, kept: 0 };
        let refused = unsafe { read_struct(&raw const stored) }.unwrap_err().to_string();
        assert!(refused.contains("struct_size") && refused.contains("_INIT"), "{refused}");
    }
}

#[test]
fn results_fit_the_size_the_caller_states() {
    let mut newer = Second { struct_size: 16, kept: 1, gained: u64::MAX };
    let out = unsafe { OutStruct::new((&raw mut newer).cast::<First>()) }.unwrap();
    out.write(First { struct_size: 8, kept: 3 });
    assert_eq!(newer, Second { struct_size: 16, kept: 3, gained: 0 });

    let mut older = Second { struct_size: 8, kept: 1, gained: 77 };
    let out = unsafe { OutStruct::new(&raw mut older) }.unwrap();
    out.write(Second { struct_size: 16, kept: 3, gained: 9 });
    assert_eq!(older, Second { struct_size: 8, kept: 3, gained: 77 });
}

#[test]
fn an_empty_array_ignores_its_pointer() {
    assert!(unsafe { slice::<f32>(std::ptr::null(), 0, "x") }.unwrap().is_empty());
    assert!(unsafe { slice_mut::<f32>(std::ptr::without_provenance_mut(3), 0, "x") }.unwrap().is_empty());
    assert!(unsafe { slice::<f32>(std::ptr::null(), 1, "x") }.is_err());
    assert!(unsafe { slice::<f32>(std::ptr::without_provenance(6), 1, "x") }.is_err());
    assert!(check_array(std::ptr::dangling::<f32>(), usize::MAX / 2, "x").is_err());
}

#[test]
fn a_bad_handle_in_an_array_is_named_by_its_place() {
    let values = [3u32, 5, 7];
    let mut handles: Vec<*const u32> = values.iter().map(|value| &raw const *value).collect();
    let all = |handles: &[*const u32]| unsafe { borrow_all(handles.as_ptr(), handles.len(), "many") };
    let sum = |found: &[&u32]| found.iter().map(|value| **value).sum::<u32>();
    assert_eq!(sum(all(&handles).unwrap()), 15);
    handles[1] = std::ptr::null();
    assert!(all(&handles).unwrap_err().to_string().contains("many[1] is NULL"));
    handles[1] = std::ptr::without_provenance(6);
    assert!(all(&handles).unwrap_err().to_string().contains("many[1] is not aligned"));
    assert!(unsafe { borrow_all::<u32>(std::ptr::null(), 0, "many") }.unwrap().is_empty());
    assert!(unsafe { borrow_all::<u32>(std::ptr::null(), 1, "many") }.is_err());
}

#[test]
fn overlapping_arguments_are_refused() {
    let data = [0f32; 8];
    let (low, high) = (Region::new("low", &data[0], 4), Region::new("high", &data[4], 4));
    let middle = Region::new("middle", &data[3], 2);
    let nothing = Region::new::<f32>("nothing", std::ptr::null(), 9);
    assert!(check_disjoint(&[low, high], &[nothing]).is_ok());
    assert!(check_disjoint(&[low, middle], &[]).is_err());
    assert!(check_disjoint(&[high], &[middle]).is_err());
    assert!(check_disjoint(&[low], &[high, high, nothing]).is_ok());
}
