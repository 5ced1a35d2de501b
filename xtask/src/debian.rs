//! Debian's archive, as this machine's own apt reaches it: the newest package of a release, downloaded but not installed.
//! An apt of our own, with its lists under target/apt, does the work, so that signatures, check sums and proxies are apt's
//! business, root is not needed, and the machine's own lists stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::host;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where this machine gets Debian from.
#[derive(Debug, PartialEq)]
struct Mirror {
    archive: String,
    /// Its path differs from the archive's, so it is known only if apt uses it.
    security: Option<String>,
}

impl Mirror {
    fn of_this_machine() -> Result<Self> {
        let targets = host::output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(SITE) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages",
        ]))?;
        Self::find(&targets, &codename()?)
    }

    /// `targets`: a line `SITE RELEASE COMPONENT` for each package list that apt knows.
    fn find(targets: &str, codename: &str) -> Result<Self> {
        let site = |wanted: &str| {
            targets.lines().find_map(|line| {
                let mut words = line.split_whitespace();
                let (site, release) = (words.next()?, words.next()?);
                (release == wanted && words.next() == Some("main"))
                    .then(|| site.trim_end_matches('/').to_owned())
            })
        };
        let archive = site(codename).or_else(|| site("stable")).with_context(|| {
            format!("apt knows no Debian archive for {codename}; add one to its sources")
        })?;
        let security = site(&format!("{codename}-security")).or_else(|| site("stable-security"));
        Ok(Self { archive, security })
    }

    fn sources(&self, release: &str, signed_by: &str) -> String {
        let mut sources = format!("deb {signed_by}{} {release} main\n", self.archive);
        // Unstable has no security suite.
        if let Some(security) = self.security.as_ref().filter(|_| release != "sid") {
            sources += &format!("deb {signed_by}{security} {release}-security main\n");
        }
        sources
    }
}

/// The package lists of one release, with its security updates.
pub struct Index {
    options: Vec<String>,
}

impl Index {
    pub fn of_this_release() -> Result<Self> {
        Self::of(&codename()?)
    }

    pub fn of(release: &str) -> Result<Self> {
        if !host::has("apt-get") {
            bail!("{release}'s packages are fetched by apt-get, which is not in PATH");
        }
        let folder = host::target().join("apt").join(release);
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(sub))
                .with_context(|| format!("can't make {}", folder.join(sub).display()))?;
        }
        let signed_by = if Path::new(KEYRING).exists() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        let list = folder.join("sources.list");
        fs::write(
            &list,
            Mirror::of_this_machine()?.sources(release, &signed_by),
        )
        .with_context(|| format!("can't write {}", list.display()))?;

        let at = |path: &str| folder.join(path).display().to_string();
        let options = [
            format!("Dir::State::Lists={}", at("lists")),
            format!("Dir::Cache={}", at("cache")),
            format!("Dir::Etc::SourceList={}", at("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            "Dir::State::Status=/dev/null".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "Acquire::Retries=3".to_owned(),
            // Old releases are no longer signed anew, and an old kernel is what we want of them.
            "Acquire::Check-Valid-Until=false".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            // The sandbox user can't write below a home folder, and apt warns about it.
            "APT::Sandbox::User=root".to_owned(),
        ]
        .into_iter()
        .map(|option| format!("--option={option}"))
        .collect();
        let index = Self { options };
        host::output(index.apt("apt-get").args(["--quiet=2", "update"]))
            .with_context(|| format!("can't get {release}'s package lists"))?;
        Ok(index)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }

    /// The names of the packages that the newest `package` depends on.
    pub fn depends(&self, package: &str) -> Result<Vec<String>> {
        let record =
            host::output(
                self.apt("apt-cache")
                    .args(["show", "--no-all-versions", package]),
            )?;
        Ok(depends_of(&record))
    }

    /// Downloads the newest `package` into `folder`.
    pub fn download(&self, package: &str, folder: &Path) -> Result<PathBuf> {
        fs::create_dir_all(folder)?;
        host::output(
            self.apt("apt-get")
                .args(["--quiet=2", "download", package])
                .current_dir(folder),
        )?;
        let prefix = format!("{package}_");
        fs::read_dir(folder)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with(&prefix) && name.ends_with(".deb")
            })
            .with_context(|| format!("apt-get left no {package} in {}", folder.display()))
    }
}

/// The names in the `Depends` field of a package's record; of alternatives, the first.
fn depends_of(record: &str) -> Vec<String> {
    record
        .lines()
        .find_map(|line| line.strip_prefix("Depends:"))
        .unwrap_or_default()
        .split(',')
        .filter_map(|dependency| dependency.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("can't read /etc/os-release")?;
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release names no VERSION_CODENAME; Debian 12 or later is expected")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: &str = "\
http://example.org/other nodistro main
http://mirror.example/debian/ bookworm contrib
http://mirror.example/debian/ bookworm main
http://mirror.example/debian/ bookworm-updates main
http://mirror.example/debian-security bookworm-security main
";

    #[test]
    fn the_mirror_is_the_one_that_apt_uses() {
        let mirror = Mirror::find(TARGETS, "bookworm").unwrap();
        assert_eq!(mirror.archive, "http://mirror.example/debian");
        assert_eq!(
            mirror.sources("bullseye", "[signed-by=/k] "),
            "deb [signed-by=/k] http://mirror.example/debian bullseye main\n\
             deb [signed-by=/k] http://mirror.example/debian-security bullseye-security main\n"
        );
        assert_eq!(
            mirror.sources("sid", ""),
            "deb http://mirror.example/debian sid main\n"
        );
    }

    #[test]
    fn a_machine_without_a_debian_archive_is_told_so() {
        let error = Mirror::find("http://example.org/other nodistro main\n", "bookworm");
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("no Debian archive for bookworm")
        );
    }

    #[test]
    fn dependencies_are_names_without_versions() {
        let record = "\
Package: linux-image-7.2.13+deb14-amd64
Version: 7.2.13-1
Pre-Depends: not-this
Depends: dracut | initramfs-tools (>= 0.120), linux-binary-7.2.13+deb14-amd64 (= 7.2.13-1)
Recommends: nor-that
";
        assert_eq!(
            depends_of(record),
            ["dracut", "linux-binary-7.2.13+deb14-amd64"]
        );
        assert!(depends_of("Package: alone\n").is_empty());
    }
}
