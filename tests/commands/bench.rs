use super::{Folder, emaudit, forge, lines, refused, text, utf8};
use emaudit::kernel::available;
use std::collections::BTreeSet;

#[test]
fn every_kernel_and_dtype_is_measured_at_the_width_of_the_file() {
    let folder = Folder::new();
    let directions = folder.sample();
    let small = ["--megabytes", "1", "--time", "1"];
    let output = emaudit(&[&["bench", utf8(&directions), "--json"][..], &small].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let mut found = lines(&output);
    assert_eq!(found.pop().unwrap()["ok"], true);
    let mut seen = BTreeSet::new();
    for figure in &found {
        assert_eq!(figure["width"], forge::WIDTH);
        for key in ["ns_per_row", "rows_per_second", "gb_per_second"] {
            let value = figure[key].as_f64().unwrap();
            assert!(value > 0.0 && value.is_finite(), "{figure}");
        }
        let name = |key: &str| figure[key].as_str().unwrap().to_owned();
        assert!(seen.insert([name("operation"), name("place"), name("dtype"), name("kernel")]), "{figure}");
    }
    // Scores in and out of cache, steering, and both at once.
    assert_eq!(seen.len(), 4 * 3 * available().len());
    let page = emaudit(&[&["bench", "--width", "64"][..], &small].concat());
    let page = text(&page.stdout);
    for kernel in available() {
        assert_eq!(page.lines().filter(|l| l.contains(&format!(" {kernel} "))).count(), 3, "{page}");
    }
    assert!(page.lines().all(|l| l.chars().count() <= 80), "{page}");
}

#[test]
fn a_bad_file_or_layer_is_refused() {
    let folder = Folder::new();
    let directions = folder.sample();
    refused(&["bench", utf8(&directions), "--layer", "2"], 1, 11, "the file has layers [1, 3]");
    refused(&["bench", utf8(&folder.path("missing"))], 1, 2, "cannot open");
    assert_eq!(emaudit(&["bench", "--width", "0"]).status.code(), Some(2));
}

#[test]
fn a_direction_of_any_length_is_measured() {
    let folder = Folder::new();
    let small = ["--megabytes", "1", "--time", "1", "--json"];
    for (name, value) in [("large", 3e38), ("tiny", 1e-45)] {
        let directions =
            folder.directions(name, |_, values| (values[2], values[3]) = ([value; 5], [3e38; 5]));
        let output = emaudit(&[&["bench", utf8(&directions), "--layer", "3"][..], &small].concat());
        assert!(output.status.success(), "{}", text(&output.stdout));
        assert_eq!(lines(&output).len(), 4 * 3 * available().len() + 1);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn rows_that_no_memory_holds_are_refused() {
    refused(&["bench", "--width", "1024", "--megabytes", "16777216"], 1, 1, "give fewer --megabytes");
}
