use super::{Folder, emaudit, refused, text, utf8};

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
