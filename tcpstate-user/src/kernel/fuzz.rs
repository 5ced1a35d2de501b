//! Properties of the kernel's descriptions of itself, for [`crate::fuzz`]; those of dumps are `snapshot`'s.

use super::btf::{Btf, layout_in};
use super::netns::mounted;
use super::tracepoint::check_format;
use crate::fuzz::shown;

/// What is read of a BTF file is in it: nothing behind it matters.
pub fn btf(bytes: &[u8]) {
    let read = |bytes: &[u8]| {
        let layout = Btf::parse(bytes).and_then(|btf| layout_in(&btf));
        layout.map_err(|error| error.to_string())
    };
    match read(bytes) {
        Ok(layout) => {
            if let Err(error) = &layout.list {
                shown(error, 0);
            }
            let longer = [bytes, &[0xff; 64]].concat();
            let again = read(&longer).expect("as it was");
            assert_eq!(again.offsets, layout.offsets);
            assert_eq!(again.accept_arguments, layout.accept_arguments);
        }
        Err(error) => shown(&error, 0),
    }
}

/// A format that is taken has each field, and is taken whatever follows.
pub fn tracepoint(bytes: &[u8]) {
    let Ok(format) = std::str::from_utf8(bytes) else {
        return;
    };
    match check_format(format) {
        Ok(()) => {
            let more = "\tfield:int oldstate;\toffset:0;\tsize:1;\tsigned:1;\n";
            check_format(&format!("{format}\n{more}")).expect("the first one counts");
            let rest = format.lines().filter(|line| !line.contains("oldstate"));
            let rest: String = rest.flat_map(|line| [line, "\n"]).collect();
            let error = check_format(&rest).expect_err("one is missing");
            shown(&error.to_string(), 0);
        }
        Err(error) => shown(&error.to_string(), 0),
    }
}

/// No more mount points than lines, nor longer ones.
pub(crate) fn mounts(mountinfo: &[u8]) {
    let paths = mounted(mountinfo);
    let lines = mountinfo.split(|&byte| byte == b'\n').count();
    assert!(paths.len() <= lines);
    let bytes: usize = paths.iter().map(|path| path.as_os_str().len()).sum();
    assert!(bytes <= mountinfo.len());
}
