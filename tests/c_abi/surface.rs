//! Everything in emaudit.h has its place: in the table of the C++ headers, in a wrapper, in a C and a C++ program.

use super::toolchain::root;
use std::collections::BTreeSet;
use std::path::Path;

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(root().join(&path)).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

/// The text of all files in `directory` whose names end so.
fn read_all(directory: &str, ending: &str) -> String {
    let entries = std::fs::read_dir(root().join(directory)).unwrap().map(|entry| entry.unwrap().path());
    let paths: Vec<_> = entries.filter(|path| path.to_string_lossy().ends_with(ending)).collect();
    assert!(!paths.is_empty(), "{directory} has no {ending}");
    paths.iter().map(read).collect()
}

/// Whether `text` has `name` followed by something that ends it.
fn mentions(text: &str, name: &str) -> bool {
    let ends = |c: char| !c.is_alphanumeric() && c != '_';
    text.match_indices(name).any(|(at, _)| text[at + name.len()..].starts_with(ends))
}

/// Names of the functions the header declares.
pub fn declared() -> BTreeSet<String> {
    let header = read("include/emaudit.h");
    let code = header.lines().filter(|line| !line.trim_start().starts_with(['*', '/', '#']));
    let opening = code.filter_map(|line| line.split_once('(').map(|(before, _)| before));
    let names = opening.filter_map(|before| before.rsplit([' ', '*']).next());
    let names: BTreeSet<String> =
        names.filter(|name| name.starts_with("emaudit_")).map(str::to_owned).collect();
    assert!(names.len() > 25, "only {} functions were found in the header", names.len());
    names
}

#[test]
fn the_table_of_the_cpp_headers_has_every_function() {
    let text = read("include/emaudit/functions.hpp");
    let entries = text.lines().filter_map(|line| line.trim_start().strip_prefix("X("));
    let table: Vec<String> =
        entries.map(|rest| format!("emaudit_{}", rest.split(')').next().unwrap())).collect();
    assert_eq!(table.iter().cloned().collect::<BTreeSet<_>>(), declared());
    assert_eq!(table.len(), declared().len(), "an entry stands twice");
}

#[test]
fn every_function_has_a_wrapper_and_is_called_from_c() {
    let wrappers = read_all("include/emaudit", ".hpp");
    let c = read_all("tests/c", ".c");
    for function in declared() {
        let short = function.strip_prefix("emaudit_").unwrap();
        // The status of an error is the one the call returned, so C++ need not ask.
        let wrapped = short == "error_status"
            || [".", "->"].iter().any(|access| wrappers.contains(&format!("{access}{short}(")));
        assert!(wrapped, "no wrapper in include/emaudit/*.hpp calls {function}");
        assert!(c.contains(&format!("{function}(")), "no program in tests/c calls {function}");
    }
}

#[test]
fn every_number_has_a_name_in_cpp() {
    let cpp = read_all("include/emaudit", ".hpp");
    let header = read("include/emaudit.h");
    let names = header.lines().filter_map(|line| line.strip_prefix("#define ")?.split_once(' '));
    let numbers: Vec<&str> =
        names.filter(|(_, value)| value.parse::<u32>().is_ok()).map(|(name, _)| name).collect();
    assert!(numbers.len() > 50, "{numbers:?}");
    for name in numbers {
        assert!(mentions(&cpp, name), "{name} has no counterpart in include/emaudit/*.hpp");
    }
}

/// How a C++ program says it; what destructors and errors call by themselves needs no saying.
fn in_cpp(function: &str) -> Option<&'static str> {
    Some(match function.strip_prefix("emaudit_").unwrap() {
        name if name.ends_with("_free") => return None,
        "abi_version" => "emaudit::load()",
        "version" => "emaudit::version()",
        "status_name" => "emaudit::name(Status::truncated)",
        "error_status" => ".status()",
        "error_message" => ".message()",
        "kernel_list" => "emaudit::kernels()",
        "kernel_name" => "emaudit::name(kernel)",
        "kernel_from_name" => "emaudit::kernel_from_name(",
        "directions_open" => "Directions::open(",
        "directions_from_bytes" => "Directions::from_bytes(",
        "directions_get_info" | "directions_get_layers" => "->info()",
        "directions_trusted_comment" => "->trusted_comment()",
        "directions_get_identity" => "->model()",
        "directions_check_model" => "->check_model(",
        "directions_get_layer_info" | "directions_get_threshold" => "->layer(",
        "directions_copy_vectors" => "->copy_vectors(",
        "probe_new" => "Probe::make(",
        "probe_get_info" => ".width()",
        "probe_score" => ".score(",
        "probe_score_all" => "Probe::score_all(",
        "probe_error_bound" => ".error_bound(",
        "steering_new" => "Steering::make(",
        "steering_apply" => "->apply(",
        "steering_score_and_apply" => "->score_and_apply(",
        "steering_check_landed" => "->check_landed(",
        "probe_to_device" => "DeviceProbe::make(",
        "device_probe_error_bound" => "device->error_bound(",
        "probe_score_device" => "device->score(",
        "steer_device" => "device->steer(",
        "score_and_steer_device" => "device->score_and_steer(",
        "drift_new" => "Drift::make(",
        "drift_push" => "drift->push(",
        "drift_get_report" => "->report()",
        "drift_reset" => "drift->reset()",
        "monitor_new" => "Monitor::make(",
        "monitor_push" => "->push(",
        "monitor_get_verdict" => "->verdict()",
        "monitor_watch" => "->watch(",
        "monitor_reset" => "->reset()",
        "log_open" => "Log::open(",
        "log_append" => "->append(",
        "log_get_info" => "log->info()",
        "audit_new" => "Audit::make(",
        "audit_watch" => "audit->watch(",
        "audit_push" => "audit->push(",
        "audit_get_verdict" => "audit->verdict()",
        "probe_slot_new" => "ProbeSlot::make(",
        "steering_slot_new" => "<emaudit::SteeringSlot>(",
        "probe_slot_acquire" | "steering_slot_acquire" => "slot.acquire()",
        "probe_slot_replace" | "steering_slot_replace" => "slot.replace(",
        other => panic!("say here how a C++ program calls emaudit_{other}, and test it in tests/cpp"),
    })
}

#[test]
fn every_function_is_used_by_a_cpp_program() {
    let programs = read_all("tests/cpp", ".cpp");
    for (function, spelling) in declared().iter().filter_map(|f| Some((f, in_cpp(f)?))) {
        assert!(
            programs.contains(spelling),
            "no program in tests/cpp has `{spelling}`, which calls {function}"
        );
    }
}
