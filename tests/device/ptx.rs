//! Embedded PTX: made from the committed source, fit for every launch, free of what kernels should not do.

use crate::nvrtc::{Nvrtc, VERSION};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// Set to write the PTX instead of comparing it.
const UPDATE: &str = "EMAUDIT_UPDATE_PTX";
/// The lowest card; what its PTX says runs on later ones too.
const FLOOR: u32 = 75;
/// Cards whose PTX or machine code is made and thrown away.
const OTHERS: [u32; 2] = [80, 90];

/// Kernels and their embedded PTX.
pub struct Embedded<'a> {
    /// The text of the kernels' source, which includes the dialect.
    pub kernels: &'a str,
    /// What is embedded.
    pub ptx: &'a str,
}

/// One parameter of a kernel, as PTX names its type.
pub type Parameter<'a> = &'a str;

impl<'a> Embedded<'a> {
    /// What stands above the compiler's text, so that a change of the source is seen without a compiler.
    fn heading(&self) -> String {
        let digest = Sha256::digest(crate::source(self.kernels));
        let digest: String = digest.iter().map(|b| format!("{b:02x}")).collect();
        format!(
            "// From kernels.cu and portable.h by NVRTC {}.{}; CONTRIBUTING.md says how. SHA-256 of both: {digest}\n",
            VERSION.0, VERSION.1
        )
    }

    /// Types of the parameters of every kernel.
    pub fn entries(&self) -> BTreeMap<&'a str, Vec<Parameter<'a>>> {
        let mut entries = BTreeMap::new();
        for entry in self.ptx.split(".visible .entry ").skip(1) {
            let (name, rest) = entry.split_once('(').expect("parameters");
            let (parameters, _) = rest.split_once(')').expect("their end");
            let kind = |line: &'a str| line.trim().strip_prefix(".param ")?.split(' ').next();
            entries.insert(name, parameters.lines().filter_map(kind).collect());
        }
        entries
    }

    /// The code of one kernel.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn body(&self, kernel: &str) -> &'a str {
        let begin = format!(".visible .entry {kernel}(");
        let rest = self.ptx.split(&begin).nth(1).unwrap_or_else(|| panic!("no kernel `{kernel}`"));
        rest.split(".visible .entry ").next().unwrap_or(rest)
    }

    /// Asserts that the kernels are launched as `launches` say, each by its name and the types of its arguments, and that
    /// every kernel is among them.
    pub fn assert_launched<'b>(&self, launches: impl IntoIterator<Item = (&'b str, Vec<Parameter<'b>>)>) {
        let entries = self.entries();
        let launches: BTreeMap<_, _> = launches.into_iter().collect();
        for (kernel, arguments) in &launches {
            assert_eq!(entries.get(kernel), Some(arguments), "{kernel}");
        }
        assert_eq!(launches.into_keys().collect::<Vec<_>>(), entries.into_keys().collect::<Vec<_>>());
    }

    /// Asserts its version and card, that blocks have the size they are launched with, and that no kernel has arrays in
    /// memory of its own.
    pub fn assert_sound(&self) {
        assert!(self.ptx.contains(".version 8.0\n") && self.ptx.contains(&format!(".target sm_{FLOOR}\n")));
        let kernels = self.ptx.matches(".visible .entry ").count();
        assert_eq!(self.ptx.matches(&format!(".maxntid {}, 1, 1\n", crate::threads())).count(), kernels);
        assert!(!self.ptx.contains(".local"), "a kernel spills into memory");
    }

    /// Asserts that the PTX in the file at `path` is what the compiler makes of the source, for later cards too; with
    /// EMAUDIT_UPDATE_PTX, writes it. `Err` says why there was no compiler: then only the digest of the source was
    /// compared.
    pub fn check_current(&self, path: &Path) -> Result<(), String> {
        let nvrtc = match Nvrtc::find() {
            Ok(nvrtc) => nvrtc,
            Err(why) => {
                assert!(std::env::var_os(UPDATE).is_none(), "{UPDATE} is set: {why}");
                assert!(
                    self.ptx.starts_with(&self.heading()),
                    "the kernels have changed since their PTX was made"
                );
                return Err(format!("{why} (only the digest of its source was compared)"));
            }
        };
        let source = crate::source(self.kernels);
        let ptx = format!("{}{}", self.heading(), nvrtc.ptx(&source, FLOOR).expect("CUDA C"));
        if std::env::var_os(UPDATE).is_some() {
            std::fs::write(path, &ptx).expect("the file of the PTX can be written");
            return Ok(());
        }
        assert!(
            ptx == self.ptx,
            "the kernels or their dialect have changed: run this test again with {UPDATE}=1"
        );
        for card in OTHERS {
            let ptx = nvrtc.ptx(&source, card).expect("CUDA C");
            assert!(ptx.contains(&format!(".target sm_{card}")));
        }
        Ok(())
    }

    /// Asserts that ptxas makes machine code for every card in which no kernel has a stack or spills registers, and
    /// returns what it prints. `Err` says why there was no ptxas.
    pub fn check_machine_code(&self) -> Result<String, String> {
        let ptxas = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/ptxas"));
        let ptxas = ptxas.filter(|p| p.exists()).ok_or("CUDA_HOME has no bin/ptxas")?;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("kernels.ptx");
        std::fs::write(&path, self.ptx).expect("a temporary file");
        let mut logs = String::new();
        for card in [FLOOR].into_iter().chain(OTHERS) {
            let card = format!("sm_{card}");
            let mut command = Command::new(&ptxas);
            let command = command.arg("-v").arg(format!("-arch={card}")).arg("-o");
            let out = command.arg(folder.path().join("cubin")).arg(&path).output().expect("ptxas runs");
            let log = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "{card}: {log}");
            let clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
            assert_eq!(log.matches(clean).count(), self.entries().len(), "{card}: {log}");
            logs.push_str(&log);
        }
        Ok(logs)
    }
}
