use super::{Folder, emaudit, forge, refused, text, utf8};

#[test]
fn the_page_fits_a_terminal_and_has_no_colour_in_a_pipe() {
    let folder = Folder::new();
    let file = folder.sample();
    let output = emaudit(&["inspect", utf8(&file), "--all"]);
    let page = text(&output.stdout);
    assert!(page.lines().all(|l| l.chars().count() <= 80), "{page}");
    assert!(!page.contains('\u{1b}'));
    assert!(page.contains("Calibration of layer 1\n") && page.contains("Calibration of layer 3\n"));
}

#[test]
fn one_layer_is_shown_where_one_is_asked_for() {
    let folder = Folder::new();
    let file = folder.sample();
    let output = emaudit(&["inspect", utf8(&file), "--layer", "1"]);
    let page = text(&output.stdout);
    assert!(
        page.contains("Calibration of layer 1\n") && !page.contains("Calibration of layer 3\n"),
        "{page}"
    );
    refused(&["inspect", utf8(&file), "--layer", "2"], 1, 11, "the file has layers [1, 3]");
}

#[test]
fn numbers_of_any_size_fit_the_page() {
    let folder = Folder::new();
    let file = folder.directions("large.safetensors", |manifest, values| {
        values[2] = [3e38; forge::WIDTH];
        let calibration = manifest.layers[1].calibration.as_mut().unwrap();
        calibration.sigma = 1.5e-38;
        calibration.quantiles =
            vec![(1e-300, -3e38), (0.12345, -1e30), (0.5, 0.0), (0.75, 1e30), (0.99, 3e38)];
        for threshold in &mut calibration.thresholds {
            (threshold.z, threshold.horizon) = (3e38, threshold.horizon + (1 << 31));
        }
        let evidence = &mut manifest.evidence;
        evidence.effect = Some(1e308);
        let controls = evidence.families.iter_mut().flat_map(|f| &mut f.controls);
        controls.for_each(|control| control.effect = -1e308);
        evidence.cell.as_mut().unwrap().alpha = 1e-30;
        let coherence = evidence.coherence.as_mut().unwrap();
        (coherence.unsteered, coherence.steered, coherence.margin) = (-1e300, -1e-300, 1.25e-300);
        let content = evidence.content_test.as_mut().unwrap();
        (content.insecure_drop, content.secure_drop, content.p_value) = (-1e308, 1e308, 1e-300);
    });
    let output = emaudit(&["inspect", utf8(&file), "--layer", "3"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let page = text(&output.stdout);
    assert!(page.lines().all(|l| l.chars().count() <= 80), "{page}");
    for line in
        ["layer 3, alpha 1.000e-30, ", "effect      1.000e308 nats", " beaten        █················◆\n"]
    {
        assert!(page.contains(line), "{line}: {page}");
    }
}
