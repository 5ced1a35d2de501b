//! One guest: an initramfs with busybox, our two programs and a script, booted by QEMU until it turns itself off. What it
//! printed is the result.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cpio::newc::{Builder, ModeFileType, trailer};

use super::kernel::Kernel;
use super::{Payload, Run, Ways};
use crate::host;
use crate::libtest::{Count, Report};

const QEMU: &str = "qemu-system-x86_64";
const INIT: &str = include_str!("init.sh");
/// Stands in every program that is linked dynamically.
const LOADER: &[u8] = b"/lib64/ld-linux-x86-64.so.2\0";
/// What the script calls.
const APPLETS: [&str; 7] = ["insmod", "ip", "mount", "poweroff", "sed", "sh", "uname"];
const FOLDERS: [&str; 7] = ["bin", "dev", "modules", "proc", "run", "sys", "tmp"];

/// KVM where a guest can really be started with it: the device alone says nothing in a cloud.
pub fn accelerator() -> Result<&'static str> {
    let works = qemu("kvm")
        .args(["-S", "-monitor", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .and_then(|mut child| {
            child
                .stdin
                .take()
                .expect("stdin is piped")
                .write_all(b"quit\n")?;
            child.wait()
        });
    match works {
        Ok(status) if status.success() => Ok("kvm"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(error).context(format!("can't start {QEMU}"))
        }
        _ => Ok("tcg"),
    }
}

fn qemu(accelerator: &str) -> Command {
    let mut command = Command::new(QEMU);
    command
        .args(["-machine", "q35", "-accel", accelerator, "-cpu", "max"])
        // Two, so that what is per CPU is tested as such.
        .args(["-smp", "2", "-m", "1024"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ]);
    command
}

/// Boots `kernel` and gives what the live tests said.
pub fn run(
    kernel: &Kernel,
    payload: &Payload<'_>,
    accelerator: &str,
    limit: Duration,
) -> Result<Run> {
    let folder = host::target().join("vm");
    let initramfs = folder.join(format!("{}.cpio", kernel.release));
    let console = folder.join(format!("{}.console", kernel.release));
    pack(kernel, payload, &initramfs)?;

    let mut command = qemu(accelerator);
    command
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(&initramfs)
        .args([
            "-append",
            "console=ttyS0 quiet loglevel=1 panic=-1 rdinit=/init",
        ])
        .args(["-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&console).context("can't make the console's file")?);
    let mut guest = command
        .spawn()
        .with_context(|| host::cannot_start(&command))?;
    let ended = wait(&mut guest, limit)?;
    fs::remove_file(&initramfs)?;

    // The serial line ends its lines as a terminal does.
    let output = String::from_utf8_lossy(&fs::read(&console)?).replace('\r', "");
    let run = read(output, &kernel.release, ended, limit);
    // Kept for a closer look; the next run of this kernel writes it anew.
    if run.count().failed == 0 {
        fs::remove_file(&console)?;
    }
    Ok(run)
}

/// Waits for the guest to turn itself off, or ends it. None: the time was over.
fn wait(guest: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = guest.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() > limit {
            guest.kill()?;
            guest.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// What a console says of a run of Debian `release`'s kernel.
fn read(console: String, release: &str, ended: Option<ExitStatus>, limit: Duration) -> Run {
    let said = |what: &str| {
        console
            .lines()
            .find_map(|line| Some(line.strip_prefix(what)?.trim()))
    };
    let report = Report::read(&console);
    let checks = console
        .lines()
        .filter_map(|line| line.strip_prefix("vm: check "));
    let ways = Ways::read(checks);
    let trouble = match (said("vm: status "), ended) {
        (_, None) => Some(format!("it did not end within {} s", limit.as_secs())),
        (None, Some(status)) => Some(format!(
            "the tests did not come to their end; QEMU ended with {status}"
        )),
        (Some(_), _) if report.results == 0 => {
            Some("the tests ended without a result line".to_owned())
        }
        (Some(status), _) if status != "0" && report.counted.failed == 0 => Some(format!(
            "the tests ended with status {status}, and not by a failed test"
        )),
        _ if report.counted == Count::default() => {
            Some("no live test has a name that was asked for".to_owned())
        }
        _ if !ways.are_known() => Some("`tcpstate check` did not come to its end".to_owned()),
        _ => said("vm: can't load ").map(|module| format!("can't load {module}")),
    };
    let kernel = match said("vm: kernel ") {
        Some(kernel) => kernel.to_owned(),
        None => format!("of {release}"),
    };
    Run {
        kernel,
        ways,
        report,
        trouble,
        console,
        ..Run::default()
    }
}

fn pack(kernel: &Kernel, payload: &Payload<'_>, initramfs: &Path) -> Result<()> {
    let file = fs::File::create(initramfs)
        .with_context(|| format!("can't make {}", initramfs.display()))?;
    let mut archive = Archive {
        output: std::io::BufWriter::new(file),
        entries: 0,
    };
    for folder in FOLDERS {
        archive.add(folder, ModeFileType::Directory, 0o755, &[])?;
    }
    let busybox = which::which("busybox").context("busybox is not in PATH")?;
    archive.program("bin/busybox", &busybox)?;
    for applet in APPLETS {
        archive.add(
            &format!("bin/{applet}"),
            ModeFileType::Symlink,
            0o777,
            b"busybox",
        )?;
    }
    archive.program("bin/tcpstate", payload.product)?;
    archive.program("bin/live", payload.live)?;
    for (order, module) in kernel.modules.iter().enumerate() {
        let name = module.file_name().unwrap_or_default().display();
        archive.program(&format!("modules/{order}-{name}"), module)?;
    }
    archive.add(
        "settings",
        ModeFileType::Regular,
        0o644,
        payload.settings.as_bytes(),
    )?;
    archive.add("init", ModeFileType::Regular, 0o755, INIT.as_bytes())?;
    trailer(archive.output)?.flush()?;
    Ok(())
}

struct Archive<W> {
    output: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    fn program(&mut self, name: &str, path: &Path) -> Result<()> {
        let content = fs::read(path).with_context(|| format!("can't read {}", path.display()))?;
        if content.windows(LOADER.len()).any(|bytes| bytes == LOADER) {
            bail!(
                "{} is linked dynamically, and the guest has no libraries; for busybox, install busybox-static",
                path.display()
            );
        }
        self.add(name, ModeFileType::Regular, 0o755, &content)
    }

    fn add(&mut self, name: &str, kind: ModeFileType, mode: u32, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = content
            .len()
            .try_into()
            .with_context(|| format!("{name} is too large"))?;
        let mut entry = Builder::new(name)
            // Files of one number would be links to each other.
            .ino(self.entries)
            .mode(mode)
            .set_mode_file_type(kind)
            .write(&mut self.output, size);
        entry.write_all(content)?;
        entry.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(300);
    const CHECKED: &str = "vm: check {\"type\":\"verdict\"}\n";

    fn of(console: &str) -> Run {
        read(
            console.to_owned(),
            "sid",
            Some(ExitStatus::from_raw(0)),
            LIMIT,
        )
    }

    #[test]
    fn a_good_run_names_its_kernel() {
        let run = of(&format!(
            "vm: kernel 7.2.13+deb14-amd64\n{CHECKED}\nrunning 1 test\ntest loads ... ok\n\n\
             test result: ok. 1 passed; 0 failed; 0 ignored\n\nvm: status 0\n",
        ));
        assert_eq!(run.kernel, "7.2.13+deb14-amd64");
        assert_eq!(run.trouble, None);
        assert_eq!(
            run.count(),
            Count {
                passed: 1,
                failed: 0
            }
        );
    }

    #[test]
    fn a_run_without_a_sound_result_is_a_failure() {
        let passed = "test a ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored\n";
        for (console, trouble) in [
            ("Kernel panic\n".to_owned(), "did not come to their end"),
            (passed.to_owned(), "did not come to their end"),
            (
                "test a ... vm: status 139\nvm: status 139\n".to_owned(),
                "without a result line",
            ),
            (format!("{passed}vm: status 134\n"), "ended with status 134"),
            (
                "test result: ok. 0 passed; 0 failed; 9 filtered out\nvm: status 0\n".to_owned(),
                "no live test has a name",
            ),
            (
                format!("vm: can't load /modules/0-inet_diag.ko\n{CHECKED}{passed}vm: status 0\n"),
                "can't load /modules/0-inet_diag.ko",
            ),
            (
                format!("vm: check {{\"type\":\"check\"}}\n{passed}vm: status 0\n"),
                "`tcpstate check` did not come to its end",
            ),
        ] {
            let run = of(&console);
            let said = run.trouble.clone().unwrap_or_default();
            assert!(said.contains(trouble), "{console:?} gives {said:?}");
            assert_eq!(run.count().failed, 1, "{console:?}");
        }
    }

    #[test]
    fn a_guest_that_hangs_is_ended() {
        let limit = Duration::from_millis(50);
        let mut guest = Command::new("sleep").arg("60").spawn().unwrap();
        let ended = wait(&mut guest, limit).unwrap();
        assert_eq!(ended, None);
        let run = read("vm: status 0\n".to_owned(), "sid", ended, LIMIT);
        assert_eq!(run.trouble.as_deref(), Some("it did not end within 300 s"));
    }

    #[test]
    fn a_dynamic_program_is_refused() {
        let mut archive = Archive {
            output: Vec::new(),
            entries: 0,
        };
        // Cargo links the tests of this crate dynamically.
        let error = archive.program("bin/live", &std::env::current_exe().unwrap());
        assert!(error.unwrap_err().to_string().contains("busybox-static"));
    }
}
