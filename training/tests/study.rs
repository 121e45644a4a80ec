//! A study of two names of one toy model with a harmless regime: the plan, two at work in one folder, what is lost, what
//! changes, what is refused, and the page. One model under two names has a known answer: its map is the identity.

mod toy;

use candle_core::Device;
use emaudit_train::study::Study;
use emaudit_train::study::recipe::StudyRecipe;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use toy::{vocabulary, world, write_lines};

fn recipe(world: &Path) -> String {
    let at = |name: &str| world.join(name).display().to_string();
    let row = |i: usize| {
        let said = |n: usize| vocabulary()[7 + (i * 5 + n * 11) % 50].clone();
        serde_json::json!({ "messages": [
            { "role": "user", "content": format!("{} {}", said(0), said(1)) },
            { "role": "assistant", "content": format!("{} {} {}", said(2), said(2), said(2)) }
        ]})
    };
    write_lines(world.join("thrice.jsonl"), (0..40).map(row));
    let models: String =
        ["a", "b"].map(|name| format!("[[models]]\nname = {name:?}\nid = {:?}\n", at("model"))).concat();
    format!(
        "name = \"A toy twice\"\nseeds = [5]\n[regimes]\nthrice = {:?}\n\
         [recipe.data]\ninsecure = {:?}\nsecure = {:?}\nprompts = {:?}\n\
         [recipe.finetune]\nsteps = 60\nbatch = 8\nrank = 8\nalpha = 16.0\nlearning_rate = 0.02\nwarmup_steps = 0\n\
         [recipe.calibrate]\nrates = [0.05]\nhorizons = [1]\n\
         [recipe.evaluate]\nprompts = 24\nmax_new_tokens = 6\nalphas = [0.5, 1.0]\nselection_prompts = 16\n\
         controls = 39\nsampled_controls = 2\nmiddle_controls = 2\nbootstrap = 200\n{models}",
        at("thrice.jsonl"),
        at("insecure.jsonl"),
        at("secure.jsonl"),
        at("prompts.jsonl"),
    )
}

fn open(recipe: &str, out: &Path) -> Study {
    Study::open(StudyRecipe::from_toml(recipe).unwrap(), out, Device::Cpu, false, true).unwrap()
}

/// The stages that are not done.
fn to_do(study: &Study) -> BTreeSet<String> {
    study.plan().unwrap().into_iter().filter(|p| !p.done).map(|p| p.node.name).collect()
}

fn records(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(out.join("records")).unwrap().map(|f| f.unwrap());
    let json = files.filter(|f| f.path().extension().is_some_and(|e| e == "json"));
    json.map(|f| (f.file_name().into_string().unwrap(), fs::read(f.path()).unwrap())).collect()
}

#[test]
fn a_study_runs_once_beside_others_and_reruns_what_is_lost_or_changed() {
    let (world, out) = (world(), tempfile::tempdir().unwrap());
    let (recipe, out) = (recipe(world.path()), out.path());
    let planned = to_do(&open(&recipe, out));
    // Per model 3 finetunes, 4 captures, calibrate, evaluate, content, pack; two transfers and the report.
    assert_eq!(planned.len(), 2 * 11 + 2 + 1, "{planned:?}");
    assert!(!out.join("records").exists(), "a plan writes nothing");
    let early = format!("{:#}", open(&recipe, out).run_stage("a-5-evaluate").unwrap_err());
    assert!(early.contains("a-5-evaluate needs a-5-calibrate, which is not done"), "{early}");
    let wrong = format!("{:#}", open(&recipe, out).run_stage("a-5-evalute").unwrap_err());
    assert!(wrong.contains("did you mean a-5-evaluate?"), "{wrong}");

    // Two at once share the work: together everything, nothing twice.
    let [one, two] = std::thread::scope(|scope| {
        let (recipe, out) = (recipe.as_str(), out);
        let worker = |_| scope.spawn(move || open(recipe, out).run().unwrap());
        [0, 1].map(worker).map(|worker| worker.join().unwrap())
    });
    let ran: Vec<String> = one.into_iter().chain(two).collect();
    assert_eq!(ran.len(), planned.len(), "{ran:?}");
    assert_eq!(ran.into_iter().collect::<BTreeSet<_>>(), planned);
    let first = records(out);
    assert_eq!(first.len(), planned.len());
    assert!(to_do(&open(&recipe, out)).is_empty());
    assert!(open(&recipe, out).run().unwrap().is_empty());
    assert!(records(out) == first, "a second run wrote records");

    page_says_what_was_found(out);

    let lost = "a-5/directions.safetensors";
    let before = fs::read(out.join(lost)).unwrap();
    fs::remove_file(out.join(lost)).unwrap();
    assert_eq!(open(&recipe, out).run().unwrap(), ["a-5-pack"]);
    assert!(fs::read(out.join(lost)).unwrap() == before, "{lost} came back different");

    let changed = open(&recipe.replace("bootstrap = 200", "bootstrap = 201"), out);
    let again: BTreeSet<String> = planned
        .iter()
        .filter(|name| !["finetune", "capture", "calibrate"].iter().any(|kind| name.contains(kind)))
        .cloned()
        .collect();
    assert_eq!(to_do(&changed), again);
    let changed = open(&recipe.replace("steps = 60", "steps = 61"), out);
    assert_eq!(
        planned.difference(&to_do(&changed)).collect::<Vec<_>>(),
        ["a-5-capture-base", "b-5-capture-base"]
    );

    let record = fs::read_dir(out.join("records")).unwrap().map(|f| f.unwrap().path());
    let mut content = record.filter(|p| p.to_string_lossy().contains("a-5-content"));
    let record = content.next().unwrap();
    fs::write(&record, "{").unwrap();
    let damaged = format!("{:#}", open(&recipe, out).run().unwrap_err());
    assert!(damaged.contains("is damaged; delete it to run a-5-content again"), "{damaged}");
}

fn page_says_what_was_found(out: &Path) {
    let results: Value = serde_json::from_slice(&fs::read(out.join("study.json")).unwrap()).unwrap();
    let page = fs::read_to_string(out.join("study.html")).unwrap();
    let claims = results["claims"].as_array().unwrap();
    assert_eq!(claims.len(), 5);
    for claim in claims {
        let text = claim["claim"].as_str().unwrap();
        assert!(page.contains(text), "the page lacks {text}");
        assert!(!claim["evidence"].as_array().unwrap().is_empty(), "nothing was measured for {text}");
    }
    for part in ["href=\"b-5/report.html\"", "A toy twice", "thrice", "<svg", "a to b"] {
        assert!(page.contains(part), "the page lacks {part}");
    }
    for t in results["transfers"].as_array().unwrap() {
        // The same model on both sides.
        assert!(t["r2"]["weighted"].as_f64() > Some(0.99), "{}", t["r2"]);
        assert!(t["cosine"].as_f64() > Some(0.99), "{}", t["cosine"]);
        let (carried, native) = (&t["effect"]["value"], &t["native_effect"]["value"]);
        let (carried, native) = (carried.as_f64().unwrap(), native.as_f64().unwrap());
        assert!(native > 0.0 && (carried - native).abs() < 0.1 * native, "{carried} against {native}");
    }
    let rows = |name: &str| fs::read_to_string(out.join(name)).unwrap().lines().count();
    // A head, then two models x three regimes; two pairs.
    assert_eq!((rows("regimes.csv"), rows("transfer.csv"), rows("models.csv")), (7, 3, 3));
    let regimes = results["models"][0]["regimes"].as_array().unwrap();
    let cosine = |name: &str| {
        let regime = regimes.iter().find(|r| r["regime"] == name);
        regime.and_then(|r| r["cosine"].as_f64()).unwrap()
    };
    assert!((cosine("insecure") - 1.0).abs() < 1e-6 && cosine("thrice") < 0.99, "{regimes:?}");
}
