//! abi.txt holds every struct, field and number of ABI version 1. The library (Rust) and the header (C) must both
//! agree with it, so nothing published can move unnoticed.

use super::toolchain::{Build, Linkage, Standard, root, run};
use emaudit::ffi::{
    audit::*, directions::*, drift::*, identity::*, layers::*, log::*, monitor::*, probe::*, steering::*,
    tensor::*,
};
use std::fmt::Write;

/// The table, on 64-bit targets: `struct NAME SIZE`, `field STRUCT.NAME OFFSET SIZE`, `number NAME VALUE`.
const TABLE: &str = "tests/c_abi/abi.txt";

/// Adds what is new to the table. What stands there must still hold; only a struct may have grown.
const UPDATE: &str = "EMAUDIT_UPDATE_ABI";

fn size_of_field<S, F>(_: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

/// Lines of one struct. A field left out does not compile.
macro_rules! layout {
    ($text:expr, $name:ident { $($field:ident),+ $(,)? }) => {{
        let _: fn($name) = |$name { $($field: _),+ }| {};
        writeln!($text, "struct {} {}", stringify!($name), size_of::<$name>()).unwrap();
        $({
            let size = size_of_field::<$name, _>(|s| &s.$field);
            let offset = std::mem::offset_of!($name, $field);
            writeln!($text, "field {}.{} {offset} {size}", stringify!($name), stringify!($field)).unwrap();
        })+
    }};
}

/// Structs and fields as Rust lays them out.
fn of_rust() -> String {
    let mut text = String::new();
    layout!(text, emaudit_tensor { struct_size, dtype, data, rows, cols, row_stride });
    layout!(
        text,
        emaudit_open_options {
            struct_size,
            mode,
            skip_verify,
            reserved,
            expected_digest,
            trusted_key,
            signature,
            signature_len,
        }
    );
    layout!(
        text,
        emaudit_directions_info {
            struct_size,
            width,
            layer_count,
            verified,
            causal,
            content,
            site,
            pooling,
            estimator,
            contrast,
            digest,
            trusted,
        }
    );
    layout!(text, emaudit_layer_info { struct_size, layer, sequences, threshold_count, sigma });
    layout!(text, emaudit_threshold { struct_size, aggregation, horizon, sequences, rate, rate_upper, z });
    layout!(
        text,
        emaudit_model_identity {
            struct_size,
            hidden_size,
            n_layers,
            vocab_size,
            site,
            reserved,
            architecture,
            tokenizer_digest,
            weights_digest,
            quantization,
            name,
        }
    );
    layout!(text, emaudit_probe_options { struct_size, kernel });
    layout!(text, emaudit_probe_info { struct_size, width, layer, kernel });
    layout!(
        text,
        emaudit_steering_options {
            struct_size,
            operation,
            alpha,
            ceiling,
            has_gate,
            gate,
            has_dose_limit,
            dose_limit,
            allow_nonspecific,
            reserved,
        }
    );
    layout!(
        text,
        emaudit_steer_report { struct_size, largest_dose, rows, touched, gated, limited, nonfinite }
    );
    layout!(
        text,
        emaudit_landing_report {
            struct_size,
            largest_deviation,
            rows,
            landed,
            lost,
            untouched,
            missed,
            nonfinite,
        }
    );
    layout!(text, emaudit_drift_options { struct_size, window, rate });
    layout!(
        text,
        emaudit_drift_report {
            struct_size,
            state,
            window,
            sequences,
            windows,
            rate,
            probability,
            z,
            share,
            lowest,
            highest,
        }
    );
    layout!(
        text,
        emaudit_audit_options { struct_size, aggregation, horizon, reserved, rate, level, concern }
    );
    layout!(
        text,
        emaudit_audit_verdict {
            struct_size,
            state,
            misalignment,
            reason,
            aggregation,
            horizon,
            layer,
            kernel,
            verified,
            reserved,
            sequences,
            judged,
            flagged,
            pending,
            invalid,
            critical,
            needed,
            threshold,
            rate,
            rate_upper,
            share,
            low,
            high,
            confidence,
            p_value,
            level,
            concern,
            detectable,
            power,
            digest,
        }
    );
    layout!(text, emaudit_log_info { struct_size, reserved, records, head });
    layout!(text, emaudit_monitor_options { struct_size, aggregation, rate });
    layout!(
        text,
        emaudit_verdict {
            struct_size,
            state,
            misalignment,
            aggregation,
            score,
            threshold,
            rate,
            rate_upper,
            tokens,
            horizon,
            layer,
            kernel,
            verified,
            reserved,
            digest,
        }
    );
    text
}

/// Structs with their fields, in the order of the header.
fn structs_of_header(header: &str) -> Vec<(String, Vec<String>)> {
    let mut list: Vec<(String, Vec<String>)> = Vec::new();
    let mut inside = false;
    for line in header.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("typedef struct ").and_then(|rest| rest.strip_suffix(" {")) {
            list.push((name.to_owned(), Vec::new()));
            inside = true;
        } else if line.starts_with('}') {
            inside = false;
        } else if inside && line.ends_with(';') {
            let declarator = line.trim_end_matches(';').split('[').next().unwrap();
            let field = declarator.rsplit([' ', '*']).next().unwrap();
            list.last_mut().unwrap().1.push(field.to_owned());
        }
    }
    list
}

/// Names of the numeric constants, in the order of the header.
fn numbers_of_header(header: &str) -> Vec<&str> {
    let defines = header.lines().filter_map(|line| line.strip_prefix("#define ")?.split_once(' '));
    defines.filter(|(_, value)| value.parse::<i64>().is_ok()).map(|(name, _)| name).collect()
}

/// The same table from a C program, with the numbers.
fn of_c() -> String {
    let header = std::fs::read_to_string(root().join("include/emaudit.h")).unwrap();
    let mut body = String::new();
    for (name, fields) in structs_of_header(&header) {
        writeln!(body, "  printf(\"struct {name} %zu\\n\", sizeof({name}));").unwrap();
        for field in fields {
            writeln!(
                body,
                "  printf(\"field {name}.{field} %zu %zu\\n\", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));"
            )
            .unwrap();
        }
    }
    for name in numbers_of_header(&header) {
        writeln!(body, "  printf(\"number {name} %lld\\n\", (long long){name});").unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("layout.c");
    let program =
        format!("#include \"emaudit.h\"\n#include <stdio.h>\nint main(void) {{\n{body}  return 0;\n}}\n");
    std::fs::write(&source, program).unwrap();
    let build = Build::new(Standard::C11, Linkage::Static);
    run(&mut build.run(directory.path(), "layout", &[source.to_str().unwrap()]).command())
}

fn update(table: &str, now: &str) {
    let broken: Vec<&str> = table
        .lines()
        .filter(|line| !line.starts_with("struct ") && !now.lines().any(|n| n == *line))
        .collect();
    assert!(broken.is_empty(), "published and gone, which needs a new EMAUDIT_ABI_VERSION: {broken:#?}");
    std::fs::write(root().join(TABLE), now).unwrap();
}

#[cfg(target_pointer_width = "64")]
#[test]
fn layout_and_numbers_are_those_of_abi_version_1() {
    let c = of_c();
    if std::env::var_os(UPDATE).is_some() {
        update(&std::fs::read_to_string(root().join(TABLE)).unwrap_or_default(), &c);
    }
    let table = std::fs::read_to_string(root().join(TABLE)).unwrap();
    for (number, (old, new)) in table.lines().zip(c.lines()).enumerate() {
        assert_eq!(
            old,
            new,
            "{TABLE}:{}: published (left) and now (right); additions: {UPDATE}=1",
            number + 1
        );
    }
    assert_eq!(table.lines().count(), c.lines().count(), "additions: run once with {UPDATE}=1");
    let layouts = |text: &str| -> Vec<String> {
        let mut lines: Vec<String> =
            text.lines().filter(|line| !line.starts_with("number ")).map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(layouts(&of_rust()), layouts(&table), "Rust (left) and the table (right)");
    assert!(layouts(&table).len() > 80);
}

#[test]
fn the_statuses_of_rust_are_those_of_the_table() {
    use emaudit::Status::*;
    let table = std::fs::read_to_string(root().join(TABLE)).unwrap();
    let all = [
        Ok,
        InvalidArgument,
        Io,
        NotADirectionFile,
        Truncated,
        Malformed,
        UnsupportedVersion,
        DigestMismatch,
        Schema,
        ModelMismatch,
        WidthMismatch,
        LayerNotFound,
        NonFinite,
        NotSpecific,
        RateUnsupported,
        KernelUnavailable,
        Panic,
        Unsigned,
        BadSignature,
        UntrustedKey,
        NotLanded,
        NotCalibrated,
        BrokenLog,
        DeviceUnavailable,
        Device,
    ];
    let mut expected = String::new();
    for status in all {
        let mut name = String::new();
        for c in format!("{status:?}").chars() {
            if c.is_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.push(c.to_ascii_uppercase());
        }
        writeln!(expected, "number EMAUDIT_STATUS_{name} {}", status as i32).unwrap();
    }
    let published: String = table
        .lines()
        .filter(|line| line.starts_with("number EMAUDIT_STATUS_"))
        .flat_map(|line| [line, "\n"])
        .collect();
    assert_eq!(expected, published);
}
