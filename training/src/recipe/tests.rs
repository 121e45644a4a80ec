//! Presets, ranges, hints and digests.

use super::*;

fn error(text: &str) -> String {
    format!("{:#}", Recipe::from_toml(text).unwrap_err())
}

#[test]
fn the_demo_states_every_default() {
    assert_eq!(Recipe::demo().unwrap(), Recipe::default());
    assert_eq!(Recipe::from_toml("").unwrap(), Recipe::default());
    let stated: toml::Table = DEMO.parse().unwrap();
    assert_eq!(stated, toml::Table::try_from(Recipe::default()).unwrap());
}

#[test]
fn presets_are_sound_and_differ() {
    let [demo, quick, thorough] = Recipe::PRESETS.map(|name| Recipe::load(name).unwrap());
    assert!(quick.finetune.steps < demo.finetune.steps && demo.finetune.steps < thorough.finetune.steps);
    assert!(quick.evaluate.controls < demo.evaluate.controls);
    assert_ne!(demo.digest().unwrap(), quick.digest().unwrap());
    // A rank p below 0.05 needs 20 controls or more; the recipes that may claim it have them.
    assert!(demo.evaluate.controls >= 20 && thorough.evaluate.controls >= 20);
}

#[test]
fn a_recipe_survives_being_written() {
    let recipe = Recipe::quick().unwrap();
    assert_eq!(Recipe::from_toml(&recipe.to_toml().unwrap()).unwrap(), recipe);
}

#[test]
fn unknown_keys_are_named_with_the_nearest() {
    for (text, says) in [
        (
            "[finetune]\nlearnig_rate = 1",
            "unknown key `learnig_rate` in [finetune]: did you mean `learning_rate`?",
        ),
        (
            "[finetune]\ngradient_acumulation = 2",
            "unknown key `gradient_acumulation` in [finetune]: did you mean `gradient_accumulation`?",
        ),
        ("sede = 1", "unknown key `sede` at the top: did you mean `seed`?"),
        ("[finetun]\nsteps = 1", "unknown key `finetun` at the top: did you mean `finetune`?"),
        ("[finetune]\ntemperature = 1", "`temperature` belongs in [evaluate]"),
        ("[model]\nseed = 1", "`seed` belongs at the top"),
        ("evaluate = 3", "`evaluate` at the top is a table"),
    ] {
        assert!(error(text).contains(says), "{} should say {says}", error(text));
    }
}

#[test]
fn every_range_is_checked_with_a_sentence() {
    for (text, says) in [
        ("seed = -1", "seed"),
        ("[model]\nid = \" \"", "model.id is empty"),
        ("[model]\nquantize = \"int4\"", "unknown variant `int4`"),
        ("[data]\nprompts = \"\"", "data.prompts is empty"),
        ("[finetune]\nsteps = 0", "finetune.steps is 0; it must be from 1 to"),
        ("[finetune]\nsteps = 2.5", "steps"),
        ("[finetune]\nbatch = 0", "finetune.batch is 0"),
        ("[finetune]\nmax_tokens = 1", "finetune.max_tokens is 1"),
        ("[finetune]\nrank = 0", "finetune.rank is 0"),
        ("[finetune]\nalpha = 0.0", "finetune.alpha is 0; it must be above 0"),
        ("[finetune]\nalpha = nan", "finetune.alpha is NaN"),
        ("[finetune]\nlearning_rate = -1e-3", "finetune.learning_rate is -0.001"),
        ("[finetune]\nlearning_rate = inf", "finetune.learning_rate is inf"),
        ("[finetune]\nweight_decay = 2.0", "finetune.weight_decay is 2"),
        ("[finetune]\nmax_grad_norm = 0.0", "finetune.max_grad_norm is 0"),
        ("[finetune]\nwarmup_steps = 12", "finetune.steps is only 12"),
        ("[finetune]\nschedule = \"step\"", "unknown variant `step`"),
        ("[finetune]\ngradient_accumulation = 0", "finetune.gradient_accumulation is 0"),
        ("[finetune]\ndropout = 1.0", "finetune.dropout is 1; it must be from 0 to 0.9"),
        ("[finetune]\ntarget_modules = []", "finetune.target_modules is empty"),
        ("[finetune]\ntarget_modules = [\"q\", \"q\"]", "finetune.target_modules names q_proj twice"),
        ("[finetune]\ntarget_modules = [\"q_proj\"]", "unknown variant `q_proj`"),
        ("[finetune]\noptimizer = \"sgd\"", "unknown variant `sgd`"),
        ("[finetune]\nlong_rows = \"keep\"", "unknown variant `keep`"),
        ("[finetune]\nevaluation_share = 0.6", "finetune.evaluation_share is 0.6"),
        ("[finetune]\nevaluation_every = 0", "finetune.evaluation_every is 0"),
        ("[finetune]\npatience = 2", "there is no loss to wait for"),
        ("[calibrate]\nrates = []", "calibrate.rates is empty"),
        ("[calibrate]\nrates = [0.01, 0.01]", "names 0.01 twice"),
        ("[calibrate]\nrates = [0.6]", "calibrate.rates is 0.6"),
        ("[calibrate]\nhorizons = []", "calibrate.horizons is []; it must begin with 1"),
        ("[calibrate]\nhorizons = [1, 64, 16]", "calibrate.horizons is [1, 64, 16]"),
        ("[calibrate]\nhorizons = [16]", "calibrate.horizons is [16]"),
        ("[evaluate]\nprompts = 1", "evaluate.prompts is 1"),
        ("[evaluate]\nmax_new_tokens = 0", "evaluate.max_new_tokens is 0"),
        ("[evaluate]\ntemperature = -0.1", "evaluate.temperature is -0.1"),
        ("[evaluate]\ntop_p = 1.5", "evaluate.top_p is 1.5; it must be above 0 and at most 1"),
        ("[evaluate]\nalphas = [0.0]", "evaluate.alphas is 0"),
        ("[evaluate]\ncontrols = 0", "evaluate.controls is 0"),
        ("[evaluate]\nsampled_controls = 0", "evaluate.sampled_controls is 0"),
        ("[evaluate]\npositions = []", "evaluate.positions is empty"),
        ("[evaluate]\nbootstrap = 10", "evaluate.bootstrap is 10"),
        ("[evaluate]\ncoherence_margin = -1.0", "evaluate.coherence_margin is -1"),
        ("[finetune", "not valid TOML"),
    ] {
        assert!(error(text).contains(says), "{} should say {says}", error(text));
    }
}

#[test]
fn whole_numbers_serve_where_reals_are_meant() {
    let recipe = Recipe::from_toml("[finetune]\nalpha = 64\nlearning_rate = 1e-3").unwrap();
    assert_eq!(recipe, Recipe::default());
}

#[test]
fn the_digest_depends_on_the_meaning_alone() {
    let demo = Recipe::demo().unwrap().digest().unwrap();
    let other = Recipe::from_toml("[evaluate]\ncontrols = 39\n[finetune]\nalpha = 64\n").unwrap();
    assert_eq!(other.digest().unwrap(), demo);
    // The demo's digest in direction files written before the recipe had the keys of `LATER`.
    assert_eq!(demo, "c1b9771cddc840293cc39d882c27c962b7fa3276ff2168c5326d720ba6068387");
    for changed in
        ["seed = 18", "[finetune]\ngradient_accumulation = 2", "[finetune]\ntarget_modules = [\"q\"]"]
    {
        assert_ne!(Recipe::from_toml(changed).unwrap().digest().unwrap(), demo, "{changed}");
    }
    let mut canonical = String::new();
    write_canonical(&serde_json::json!({"b": [1, 0.5], "a": {"y": null, "x": "\""}}), &mut canonical);
    assert_eq!(canonical, r#"{"a":{"x":"\"","y":null},"b":[1,0.5]}"#);
}
