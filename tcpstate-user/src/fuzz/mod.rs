//! What holds for any bytes from outside: one property for each reader, as the fuzz targets below `fuzz/` try it, and as
//! the tests do over the inputs that are kept there.
//!
//! Not in the product: only in tests, and with the feature `fuzz`. A property of what a module keeps to itself stands in
//! a `fuzz.rs` of that module. Each takes any bytes, and panics where the property does not hold.

mod events;
mod texts;

pub use self::events::events;
pub use self::texts::{config, filter, proc};
use crate::export::acts;
pub use crate::export::fuzz::stream;
pub use crate::export::http::fuzz::http;
pub use crate::kernel::fuzz::{btf, tracepoint};
pub use crate::kernel::snapshot::fuzz::{diag, sockets};
pub use crate::owner::fuzz::sweep;

/// Checks what is shown to people, where `bytes` of input led to it: one line that does nothing to a terminal, and not
/// longer than what is said of each byte can be.
pub(crate) fn shown(line: &str, bytes: usize) {
    assert!(line.chars().all(is_harmless), "{line:?}");
    let most = 1024 + 16 * bytes;
    assert!(
        line.len() <= most,
        "{} bytes said of {bytes}: {line}",
        line.len()
    );
}

/// Neither a control character, nor one that changes the order of the others.
pub(crate) fn is_harmless(char: char) -> bool {
    // Most are, and this is asked of each.
    matches!(char, ' '..='~') || !acts(char)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    type Property = fn(&[u8]);

    const TARGETS: [(&str, Property); 11] = [
        ("btf", super::btf),
        ("config", super::config),
        ("diag", super::diag),
        ("events", super::events),
        ("filter", super::filter),
        ("http", super::http),
        ("proc", super::proc),
        ("sockets", super::sockets),
        ("stream", super::stream),
        ("sweep", super::sweep),
        ("tracepoint", super::tracepoint),
    ];

    fn fuzz() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz")
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder);
        let entries = entries.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        entries
            .map(|entry| entry.expect("an entry").path())
            .collect()
    }

    fn names(folder: &str) -> BTreeSet<String> {
        let name = |path: PathBuf| path.file_stem().expect("a name").display().to_string();
        files(&fuzz().join(folder)).into_iter().map(name).collect()
    }

    #[test]
    fn each_property_has_a_target_and_kept_inputs() {
        let known = TARGETS.map(|(name, _)| name.to_owned());
        assert_eq!(names("fuzz_targets"), BTreeSet::from(known.clone()));
        assert_eq!(names("corpus"), BTreeSet::from(known));
    }

    #[test]
    fn the_properties_hold_for_the_kept_inputs() {
        for (name, property) in TARGETS {
            let inputs = files(&fuzz().join("corpus").join(name));
            assert!(!inputs.is_empty(), "no input for {name}");
            for input in inputs {
                // Shown where the property does not hold.
                println!("{}", input.display());
                property(&fs::read(&input).expect("readable"));
            }
        }
    }
}
