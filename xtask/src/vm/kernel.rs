//! A release's kernel: its image and the modules that the tests need, cached under target/vm/kernels. A cached kernel is
//! used as it is; remove its folder for the newest one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::debian::Index;
use crate::host;

/// Depends on the release's newest kernel.
const META_PACKAGE: &str = "linux-image-amd64";
/// Where a kernel's files are: in recent releases the image and the modules have packages of their own.
const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];
/// What inet_diag snapshots need, in the order of loading; then the interfaces of tests.
const MODULES: [&str; 4] = ["inet_diag", "tcp_diag", "tun", "veth"];

pub struct Kernel {
    pub release: String,
    pub image: PathBuf,
    pub modules: Vec<PathBuf>,
}

pub fn of_release(release: &str) -> Result<Kernel> {
    let folder = host::target().join("vm/kernels").join(release);
    if let Ok(kernel) = Kernel::in_folder(release, &folder) {
        return Ok(kernel);
    }
    host::say(&format!("getting the newest kernel of Debian {release}"));
    let index = Index::of(release)?;
    // Complete or not there: a run that is cut short leaves a folder of another name.
    let unfinished = folder.with_extension("unfinished");
    let _ = fs::remove_dir_all(&unfinished);
    fs::create_dir_all(&unfinished)?;
    for package in packages(&index)? {
        let file = index.download(&package, &unfinished)?;
        unpack(&file, &unfinished)?;
        fs::remove_file(file)?;
    }
    for module in MODULES {
        if let Some(packed) = find(&unfinished, &format!("{module}.ko.xz")) {
            host::output(Command::new("xz").arg("--decompress").arg(&packed))?;
        }
    }
    Kernel::in_folder(release, &unfinished)?;
    // One that was made for fewer modules.
    let _ = fs::remove_dir_all(&folder);
    fs::rename(&unfinished, &folder)?;
    Kernel::in_folder(release, &folder)
}

impl Kernel {
    fn in_folder(release: &str, folder: &Path) -> Result<Self> {
        let here = |name: &str| {
            find(folder, name)
                .with_context(|| format!("Debian {release}'s kernel packages have no {name}*"))
        };
        Ok(Self {
            release: release.to_owned(),
            image: here("vmlinuz")?,
            modules: MODULES
                .iter()
                .map(|module| here(&format!("{module}.ko")))
                .collect::<Result<_>>()?,
        })
    }
}

/// The packages that hold the files of the newest kernel.
fn packages(index: &Index) -> Result<Vec<String>> {
    let mut found: Vec<String> = Vec::new();
    let mut open = vec![META_PACKAGE.to_owned()];
    while let Some(package) = open.pop() {
        for dependency in index.depends(&package)? {
            if is_part(&dependency) && !found.contains(&dependency) {
                open.push(dependency.clone());
                found.push(dependency);
            }
        }
    }
    if found.is_empty() {
        bail!("{META_PACKAGE} depends on no kernel");
    }
    Ok(found)
}

/// `linux-image-6.1.0-40-amd64`, but no meta package such as `linux-image-amd64`.
fn is_part(package: &str) -> bool {
    PARTS.iter().any(|part| {
        package
            .strip_prefix(part)
            .is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit()))
    })
}

/// Takes the image and our modules out of a package; all modules would be 400 MB.
fn unpack(package: &Path, folder: &Path) -> Result<()> {
    let mut unpack = Command::new("dpkg-deb");
    unpack
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped());
    let mut unpacking = unpack
        .spawn()
        .with_context(|| host::cannot_start(&unpack))?;
    let archive = unpacking.stdout.take().expect("stdout is piped");
    let mut tar = Command::new("tar");
    tar.args([
        "--extract",
        "--wildcards",
        "--ignore-failed-read",
        "--directory",
    ])
    .arg(folder)
    .arg("*/vmlinuz*")
    .args(MODULES.map(|module| format!("*/{module}.ko*")))
    .stdin(archive)
    // It says which of the patterns this package lacks: expected, and what lacks in all is found out afterwards.
    .stderr(Stdio::null());
    tar.status().with_context(|| host::cannot_start(&tar))?;
    let status = unpacking.wait()?;
    if !status.success() {
        bail!("{} ended with {status}", host::shown(&unpack));
    }
    Ok(())
}

/// The first file below `folder` whose name begins with `prefix`.
fn find(folder: &Path, prefix: &str) -> Option<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    entries.sort();
    entries.into_iter().find_map(|path| {
        if path.is_dir() {
            find(&path, prefix)
        } else {
            path.file_name()?
                .to_str()?
                .starts_with(prefix)
                .then_some(path)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_from_meta_packages() {
        for part in [
            "linux-image-5.10.0-36-amd64",
            "linux-binary-7.2.13+deb14-amd64",
            "linux-modules-7.2.13+deb14-amd64",
        ] {
            assert!(is_part(part), "{part}");
        }
        for other in [
            META_PACKAGE,
            "linux-base-7.2.13+deb14-amd64",
            "linux-base",
            "dracut",
        ] {
            assert!(!is_part(other), "{other}");
        }
    }

    #[test]
    fn files_are_found_at_any_depth() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("lib/modules/5.10/net");
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("tcp_diag.ko"), "").unwrap();
        assert_eq!(
            find(folder.path(), "tcp_diag.ko"),
            Some(deep.join("tcp_diag.ko"))
        );
        assert_eq!(find(folder.path(), "inet_diag.ko"), None);
    }
}
