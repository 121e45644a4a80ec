//! Models by a hub's `owner/name`, through the cache that Python's huggingface_hub shares.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};

use super::{ModelFiles, ResolvedModel, is_weights, missing_files, shards};

/// Files worth having beside weights and index, where a repository holds them.
const SMALL: [&str; 5] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
];

pub(super) fn resolve(repository: &str, revision: Option<&str>) -> Result<ResolvedModel> {
    let offline = std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| !matches!(v.as_str(), "" | "0"));
    resolve_in(&cache()?, repository, revision, offline)
}

/// A model that is in the cache, whole.
pub(super) fn cached(name: &str, revision: Option<&str>) -> Result<Option<ResolvedModel>> {
    let repo = Repo::with_revision(name.to_owned(), RepoType::Model, revision.unwrap_or("main").to_owned());
    let whole = snapshot(&cache()?, &repo).filter(|(folder, _)| missing_files(folder).is_empty());
    Ok(whole.map(|(folder, commit)| found(name, folder, &commit)))
}

/// The hub's cache, found by the same variables as in Python.
fn cache() -> Result<Cache> {
    let set = |variable: &str| std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(folder) = set("HF_HUB_CACHE") {
        return Ok(Cache::new(folder));
    }
    if let Some(home) = set("HF_HOME") {
        return Ok(Cache::new(home.join("hub")));
    }
    let home = dirs::home_dir()
        .ok_or_else(|| anyhow!("this system names no home folder: set HF_HOME to a folder"))?;
    Ok(Cache::new(home.join(".cache").join("huggingface").join("hub")))
}

pub(super) fn resolve_in(
    cache: &Cache,
    name: &str,
    revision: Option<&str>,
    offline: bool,
) -> Result<ResolvedModel> {
    let repo = Repo::with_revision(name.to_owned(), RepoType::Model, revision.unwrap_or("main").to_owned());
    let cached = snapshot(cache, &repo);
    if let Some((folder, commit)) = &cached
        && missing_files(folder).is_empty()
    {
        return Ok(found(name, folder.clone(), commit));
    }
    if offline {
        let state = match cached {
            Some((folder, _)) => format!("its cache lacks {}", missing_files(&folder).join(", ")),
            None => format!("it is not in the cache {}", cache.path().display()),
        };
        bail!(
            "the model {name} cannot be loaded offline: {state}; unset HF_HUB_OFFLINE, or name a local folder"
        );
    }
    let (folder, commit) = download(cache, &repo, name).with_context(|| {
        format!(
            "cannot get the model {name} from the hub; without a network, copy its config.json, tokenizer.json, \
             tokenizer_config.json and *.safetensors into a folder and name that folder instead"
        )
    })?;
    let missing = missing_files(&folder);
    ensure!(missing.is_empty(), "the hub's model {name} lacks {}", missing.join(", "));
    Ok(found(name, folder, &commit))
}

fn found(name: &str, folder: PathBuf, commit: &str) -> ResolvedModel {
    ResolvedModel { files: ModelFiles::Folder(folder), origin: format!("hub {name}@{commit}") }
}

/// The cached files of a revision, which is a branch or tag with a reference, or a commit itself.
fn snapshot(cache: &Cache, repo: &Repo) -> Option<(PathBuf, String)> {
    let root = cache.path().join(repo.folder_name());
    let commit = match std::fs::read_to_string(root.join("refs").join(repo.revision())) {
        Ok(text) => text.trim().to_owned(),
        Err(_) => repo.revision().to_owned(),
    };
    let plain = !commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric());
    let folder = root.join("snapshots").join(&commit);
    (plain && folder.is_dir()).then_some((folder, commit))
}

fn download(cache: &Cache, repo: &Repo, name: &str) -> Result<(PathBuf, String)> {
    let mut builder = ApiBuilder::from_cache(cache.clone()).with_progress(false);
    if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint);
    }
    if let Ok(token) = std::env::var("HF_TOKEN") {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build().context("cannot set up the connection")?.repo(repo.clone());
    let info = api.info().context("cannot list its files (does it exist, and may this token read it?)")?;
    let files: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    let fetch = |file: &str| -> Result<PathBuf> {
        crate::progress::note(&format!("fetching {name}/{file}"));
        api.get(file).with_context(|| format!("cannot fetch {file}"))
    };
    let mut folder = None;
    for file in SMALL.iter().filter(|file| files.iter().any(|f| f == *file)) {
        folder = fetch(file)?.parent().map(Path::to_owned);
    }
    let folder = folder.ok_or_else(|| anyhow!("it holds no config.json"))?;
    let index = "model.safetensors.index.json";
    let weights: Vec<String> = if files.iter().any(|f| f == index) {
        fetch(index)?;
        shards(&folder)?.unwrap_or_default()
    } else if files.iter().any(|f| f == "model.safetensors") {
        vec!["model.safetensors".to_owned()]
    } else {
        files.iter().filter(|f| is_weights(f)).cloned().collect()
    };
    if weights.is_empty() && files.iter().any(|f| f.ends_with(".gguf")) {
        bail!("it holds no safetensors but GGUF files: download the one you want and name it by its path");
    }
    for file in &weights {
        fetch(file)?;
    }
    Ok((folder, info.sha))
}
