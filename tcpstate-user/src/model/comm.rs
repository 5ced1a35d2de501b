//! Names of processes: bytes that other users choose, made safe to show.

use std::fmt;

use tcpstate_common::event::COMM_LEN;

/// A command name as the kernel holds it: up to 15 bytes of anything but NUL.
///
/// `Display` is safe for terminals and labels: control characters, other unprintable ones, backslashes and
/// invalid UTF-8 are escaped, so that different names stay different.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Comm([u8; COMM_LEN]);

impl Comm {
    /// Takes what stands before the first NUL; the rest may be anything.
    #[must_use]
    pub fn from_kernel(bytes: [u8; COMM_LEN]) -> Self {
        Self::from_bytes(&bytes)
    }

    /// Takes the first 15 bytes at most, up to a NUL, as the kernel does.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let len = bytes
            .iter()
            .take(COMM_LEN - 1)
            .position(|&byte| byte == 0)
            .unwrap_or(bytes.len().min(COMM_LEN - 1));
        let mut comm = [0; COMM_LEN];
        comm[..len].copy_from_slice(&bytes[..len]);
        Self(comm)
    }

    /// Reads what `Display` wrote. What it can't have written is taken as it stands, as far as it fits.
    #[must_use]
    pub fn from_escaped(shown: &str) -> Self {
        let mut bytes = Vec::with_capacity(COMM_LEN);
        let mut rest = shown;
        while let Some(char) = rest.chars().next() {
            let (byte_or_char, len) =
                unescape(rest).unwrap_or((Unescaped::Char(char), char.len_utf8()));
            match byte_or_char {
                Unescaped::Byte(byte) => bytes.push(byte),
                Unescaped::Char(char) => bytes.extend(char.encode_utf8(&mut [0; 4]).as_bytes()),
            }
            rest = &rest[len..];
        }
        Self::from_bytes(&bytes)
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        let len = self.0.iter().position(|&byte| byte == 0);
        &self.0[..len.unwrap_or(COMM_LEN)]
    }
}

enum Unescaped {
    Byte(u8),
    Char(char),
}

/// The escape that `text` begins with, and its length.
fn unescape(text: &str) -> Option<(Unescaped, usize)> {
    let escape = text.strip_prefix('\\')?;
    let kind = escape.chars().next()?;
    let char = match kind {
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        '0' => '\0',
        '\\' => '\\',
        'x' => {
            let byte = u8::from_str_radix(escape.get(1..3)?, 16).ok()?;
            return Some((Unescaped::Byte(byte), 4));
        }
        'u' => {
            let digits = escape[1..].strip_prefix('{')?.split_once('}')?.0;
            let char = char::from_u32(u32::from_str_radix(digits, 16).ok()?)?;
            return Some((Unescaped::Char(char), digits.len() + 4));
        }
        _ => return None,
    };
    Some((Unescaped::Char(char), 2))
}

impl fmt::Display for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        // Most names need no escape, and this is done for every line.
        if let Ok(plain) = std::str::from_utf8(self.as_bytes())
            && plain
                .bytes()
                .all(|byte| matches!(byte, b' '..=b'~') && byte != b'\\')
        {
            return f.pad(plain);
        }
        let mut shown = String::with_capacity(COMM_LEN);
        for chunk in self.as_bytes().utf8_chunks() {
            for char in chunk.valid().chars() {
                match char {
                    // Quotes do no harm that JSON, CSV and the label encoder don't see to themselves.
                    '"' | '\'' => shown.push(char),
                    _ => shown.extend(char.escape_debug()),
                }
            }
            for byte in chunk.invalid() {
                write!(shown, "\\x{byte:02x}")?;
            }
        }
        f.pad(&shown)
    }
}

impl fmt::Debug for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{self}`")
    }
}

#[cfg(test)]
mod tests {
    use super::Comm;

    #[test]
    fn hostile_names_are_escaped_and_stay_different() {
        let cases: [(&[u8], &str); 9] = [
            (b"nginx", "nginx"),
            ("caf\u{e9}".as_bytes(), "caf\u{e9}"),
            (b"a b\"c'", "a b\"c'"),
            (b"line\nfeed", "line\\nfeed"),
            (b"\x1b[2J", "\\u{1b}[2J"),
            (b"back\\n", "back\\\\n"),
            (b"bad\xff", "bad\\xff"),
            ("\u{202e}rtl".as_bytes(), "\\u{202e}rtl"),
            (b"", ""),
        ];
        for (bytes, shown) in cases {
            assert_eq!(Comm::from_bytes(bytes).to_string(), shown);
        }
    }

    proptest::proptest! {
        #[test]
        fn what_is_shown_can_be_read_back(bytes in proptest::collection::vec(1u8.., 0..=15)) {
            let comm = Comm::from_bytes(&bytes);
            proptest::prop_assert_eq!(Comm::from_escaped(&comm.to_string()), comm);
        }

        #[test]
        fn any_text_can_be_read(text in ".{0,40}") {
            let _ = Comm::from_escaped(&text);
        }
    }

    #[test]
    fn an_escape_that_is_none_is_taken_as_it_stands() {
        for text in ["\\", "\\q", "\\x", "\\xé", "\\u{", "\\u{110000}", "\\xzz"] {
            assert_eq!(Comm::from_escaped(text).as_bytes(), text.as_bytes());
        }
    }

    #[test]
    fn the_kernels_bytes_end_at_the_first_nul() {
        let comm = Comm::from_kernel(*b"short\0garbage\0\0\0");
        assert_eq!(comm.as_bytes(), b"short");
        let full = Comm::from_kernel([b'x'; 16]);
        assert_eq!(full.as_bytes().len(), 15);
    }
}
