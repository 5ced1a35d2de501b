//! Instants as text. A second is converted once, however many lines fall into it.

use std::io::Write as _;

use jiff::Timestamp;
use jiff::tz::TimeZone;

const NANOS: u64 = 1_000_000_000;

/// A piece of text that holds for one second of Unix time.
struct PerSecond {
    second: Option<u64>,
    text: String,
}

impl PerSecond {
    const fn new() -> Self {
        Self {
            second: None,
            text: String::new(),
        }
    }

    fn get(&mut self, second: u64, render: impl FnOnce(Timestamp) -> String) -> &str {
        if self.second != Some(second) {
            // Above the year 9999 only if the clock is broken: shown as the last second that can be.
            let instant = i64::try_from(second)
                .ok()
                .and_then(|second| Timestamp::from_second(second).ok())
                .unwrap_or(Timestamp::MAX);
            self.text = render(instant);
            self.second = Some(second);
        }
        &self.text
    }
}

/// `2026-11-20T23:10:11.123456789Z`.
pub struct Utc(PerSecond);

impl Default for Utc {
    fn default() -> Self {
        Self(PerSecond::new())
    }
}

impl Utc {
    pub fn write(&mut self, time_ns: u64, out: &mut Vec<u8>) {
        let second = self.0.get(time_ns / NANOS, |instant| {
            instant.strftime("%Y-%m-%dT%H:%M:%S").to_string()
        });
        out.extend_from_slice(second.as_bytes());
        let written = write!(out, ".{:09}Z", time_ns % NANOS);
        written.expect("a Vec takes everything");
    }
}

/// `23:10:11.123` in a time zone.
pub struct OfDay {
    zone: TimeZone,
    second: PerSecond,
}

impl OfDay {
    pub const fn new(zone: TimeZone) -> Self {
        Self {
            zone,
            second: PerSecond::new(),
        }
    }

    pub fn write(&mut self, time_ns: u64, out: &mut Vec<u8>) {
        let zone = &self.zone;
        let second = self.second.get(time_ns / NANOS, |instant| {
            let local = instant.to_zoned(zone.clone());
            local.strftime("%H:%M:%S").to_string()
        });
        out.extend_from_slice(second.as_bytes());
        let written = write!(out, ".{:03}", time_ns % NANOS / 1_000_000);
        written.expect("a Vec takes everything");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn utc(time_ns: u64) -> String {
        let mut out = Vec::new();
        Utc::default().write(time_ns, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn nine_digits_and_z() {
        assert_eq!(utc(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(
            utc(1_795_216_211_123_456_789),
            "2026-11-20T23:10:11.123456789Z"
        );
        assert_eq!(utc(u64::MAX), "2554-07-21T23:34:33.709551615Z");
    }

    #[test]
    fn seconds_follow_each_other_through_the_cache() {
        let (mut clock, mut out) = (OfDay::new(TimeZone::fixed(jiff::tz::offset(2))), Vec::new());
        for time_ns in [
            59_999_999_999,
            60_000_000_000,
            60_001_000_000,
            59_000_000_000,
        ] {
            clock.write(time_ns, &mut out);
            out.push(b' ');
        }
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "02:00:59.999 02:01:00.000 02:01:00.001 02:00:59.000 "
        );
    }
}
