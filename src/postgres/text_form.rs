//! Text forms: PostgreSQL's binary send format of a value, rewritten as the text PostgreSQL prints
//! for it (DateStyle ISO, IntervalStyle postgres, TimeZone UTC).
//!
//! Bytes in, text out: knows no OID, NULL, column, session or driver, and reads no setting.
//! Invariant: bytes that PostgreSQL's own receive function refuses are `Malformed`, never a guess.

use std::array::TryFromSliceError;
use std::iter;
use std::ops::{Range, RangeInclusive};

use crate::hex;

/// The bytes are not a value of the type: truncated, too long, or outside PostgreSQL's range.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl From<TryFromSliceError> for Malformed {
    fn from(_: TryFromSliceError) -> Self {
        Malformed
    }
}

/// Text of a `numeric`, with as many fractional digits as the value displays.
///
/// The longest text is PostgreSQL's own: a sign, 131,072 digits, a point and 16,383 digits. Ten
/// bytes can ask for it, so limits on the size of a result count the text, not the bytes.
///
/// # Errors
///
/// `Malformed` if `numeric_recv` would refuse the bytes.
pub(super) fn numeric(bytes: &[u8]) -> Result<String, Malformed> {
    let (header, groups) = split::<8>(bytes)?;
    let [n0, n1, w0, w1, s0, s1, d0, d1] = header;
    let digits = numeric_digits(groups, u16::from_be_bytes([n0, n1]))?;
    let weight = i16::from_be_bytes([w0, w1]);
    let scale = u16::from_be_bytes([d0, d1]);
    if scale > NUMERIC_SCALE_MAX {
        return Err(Malformed);
    }
    match u16::from_be_bytes([s0, s1]) {
        0x0000 => Ok(magnitude(&digits, weight, scale)),
        0x4000 => Ok(negated(magnitude(&digits, weight, scale))),
        0xC000 => Ok("NaN".to_owned()),
        0xD000 => Ok("Infinity".to_owned()),
        0xF000 => Ok("-Infinity".to_owned()),
        _ => Err(Malformed),
    }
}

/// Text of a `date`.
///
/// # Errors
///
/// `Malformed` if `date_recv` would refuse the bytes.
pub(super) fn date(bytes: &[u8]) -> Result<String, Malformed> {
    match i32::from_be_bytes(bytes.try_into()?) {
        i32::MAX => Ok("infinity".to_owned()),
        i32::MIN => Ok("-infinity".to_owned()),
        days if DATE_DAYS.contains(&days) => {
            let mut text = String::with_capacity(MOMENT_BYTES);
            let era = calendar(&mut text, i64::from(days));
            text.push_str(era);
            Ok(text)
        }
        _ => Err(Malformed),
    }
}

/// Text of a `time`, up to and including 24:00:00.
///
/// # Errors
///
/// `Malformed` if `time_recv` would refuse the bytes.
pub(super) fn time(bytes: &[u8]) -> Result<String, Malformed> {
    let micros = i64::from_be_bytes(bytes.try_into()?);
    if !TIME_MICROS.contains(&micros) {
        return Err(Malformed);
    }
    let mut text = String::with_capacity(MOMENT_BYTES);
    clock(&mut text, micros.unsigned_abs());
    Ok(text)
}

/// Text of a `timetz`, in the zone the value carries.
///
/// # Errors
///
/// `Malformed` if `timetz_recv` would refuse the bytes.
pub(super) fn timetz(bytes: &[u8]) -> Result<String, Malformed> {
    let (micros, seconds_west) = split::<8>(bytes)?;
    let seconds_west = i32::from_be_bytes(seconds_west.try_into()?);
    if !ZONE_SECONDS.contains(&seconds_west) {
        return Err(Malformed);
    }
    Ok(time(&micros)? + &zone(seconds_west))
}

/// Text of a `timestamp`.
///
/// # Errors
///
/// `Malformed` if `timestamp_recv` would refuse the bytes.
pub(super) fn timestamp(bytes: &[u8]) -> Result<String, Malformed> {
    moment(bytes, "")
}

/// Text of a `timestamptz`, always in UTC.
///
/// # Errors
///
/// `Malformed` if `timestamptz_recv` would refuse the bytes.
pub(super) fn timestamptz(bytes: &[u8]) -> Result<String, Malformed> {
    moment(bytes, "+00")
}

/// Text of an `interval`. Months, days and time keep their own signs, as PostgreSQL keeps them.
///
/// # Errors
///
/// `Malformed` if there are not exactly sixteen bytes: PostgreSQL accepts every such interval.
pub(super) fn interval(bytes: &[u8]) -> Result<String, Malformed> {
    let (micros, rest) = split::<8>(bytes)?;
    let (days, months) = split::<4>(rest)?;
    let micros = i64::from_be_bytes(micros);
    let days = i32::from_be_bytes(days);
    let months = i32::from_be_bytes(months.try_into()?);
    // PostgreSQL 17 gave the extremes of all three parts a meaning; before, no calculation reached them.
    match (micros, days, months) {
        (i64::MAX, i32::MAX, i32::MAX) => return Ok("infinity".to_owned()),
        (i64::MIN, i32::MIN, i32::MIN) => return Ok("-infinity".to_owned()),
        _ => {}
    }

    let mut parts = Vec::new();
    let mut previous = 0;
    for (value, unit) in [(months / 12, "year"), (months % 12, "mon"), (days, "day")] {
        if value == 0 {
            continue;
        }
        // Only the part right after a negative one shows a plus: PostgreSQL's own oddity.
        let plus = if previous < 0 && value > 0 { "+" } else { "" };
        // PostgreSQL's plural is anything but one, so minus one is "-1 days".
        let plural = if value == 1 { "" } else { "s" };
        parts.push(format!("{plus}{value} {unit}{plural}"));
        previous = value;
    }
    if micros != 0 || parts.is_empty() {
        let sign = match (micros < 0, previous < 0) {
            (true, _) => "-",
            (false, true) => "+",
            (false, false) => "",
        };
        let mut time = sign.to_owned();
        clock(&mut time, micros.unsigned_abs());
        parts.push(time);
    }
    Ok(parts.join(" "))
}

/// Text of a `uuid`.
///
/// # Errors
///
/// `Malformed` if there are not exactly sixteen bytes.
pub(super) fn uuid(bytes: &[u8]) -> Result<String, Malformed> {
    let bytes: [u8; 16] = bytes.try_into()?;
    let mut text = String::with_capacity(36);
    for (index, digit) in hex::digits(&bytes).enumerate() {
        if matches!(index, 8 | 12 | 16 | 20) {
            text.push('-');
        }
        text.push(digit);
    }
    Ok(text)
}

/// Most digits a `numeric` displays after its point: NUMERIC_DSCALE_MAX.
const NUMERIC_SCALE_MAX: u16 = 0x3FFF;

/// Days from 2000-01-01 of a finite date: 4714-11-24 BC to 5874897-12-31, from IS_VALID_DATE.
const DATE_DAYS: Range<i32> = -2_451_545..2_145_031_949;

/// Microseconds from 2000-01-01 of a finite timestamp: MIN_TIMESTAMP to before END_TIMESTAMP.
const TIMESTAMP_MICROS: Range<i64> = -211_813_488_000_000_000..9_223_371_331_200_000_000;

/// Microseconds in a day: USECS_PER_DAY.
const DAY_MICROS: i64 = 86_400_000_000;

/// Microseconds of a time of day; the end of the day is a time, 24:00:00.
const TIME_MICROS: RangeInclusive<i64> = 0..=DAY_MICROS;

/// Seconds west of UTC of a zone: less than TZDISP_LIMIT, sixteen hours, to either side.
const ZONE_SECONDS: RangeInclusive<i32> = -57_599..=57_599;

/// The first `N` bytes and the rest.
fn split<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), Malformed> {
    let (first, rest) = bytes.split_first_chunk().ok_or(Malformed)?;
    Ok((*first, rest))
}

/// The decimal digits of exactly `count` base-10,000 groups, four to a group.
fn numeric_digits(groups: &[u8], count: u16) -> Result<String, Malformed> {
    let (groups, odd) = groups.as_chunks::<2>();
    if groups.len() != usize::from(count) || !odd.is_empty() {
        return Err(Malformed);
    }
    let mut digits = String::with_capacity(groups.len() * 4);
    for group in groups {
        let group = u32::from(u16::from_be_bytes(*group));
        if group > 9_999 {
            return Err(Malformed);
        }
        digits.extend([1_000, 100, 10, 1].iter().filter_map(|place| char::from_digit(group / place % 10, 10)));
    }
    Ok(digits)
}

/// The digits around their point: `weight` places it after the group of that index, and zeros
/// nobody sent are filled in on either side. Digits beyond `scale` are dropped, not rounded, as
/// `numeric_recv` drops them.
fn magnitude(digits: &str, weight: i16, scale: u16) -> String {
    let point = (i32::from(weight) + 1) * 4;
    let zeros_before = usize::try_from(-point).unwrap_or(0);
    let whole_len = usize::try_from(point).unwrap_or(0);
    let mut digits = iter::repeat_n('0', zeros_before).chain(digits.chars()).chain(iter::repeat('0'));

    let mut text: String = digits.by_ref().take(whole_len).skip_while(|d| *d == '0').collect();
    if text.is_empty() {
        text.push('0');
    }
    if scale > 0 {
        text.push('.');
        text.extend(digits.take(usize::from(scale)));
    }
    text
}

/// PostgreSQL has no negative zero, and a value can become zero when digits are dropped.
fn negated(magnitude: String) -> String {
    if magnitude.contains(|c| matches!(c, '1'..='9')) { format!("-{magnitude}") } else { magnitude }
}

/// A timestamp in `zone`. The era closes the text, after the zone.
fn moment(bytes: &[u8], zone: &str) -> Result<String, Malformed> {
    match i64::from_be_bytes(bytes.try_into()?) {
        i64::MAX => Ok("infinity".to_owned()),
        i64::MIN => Ok("-infinity".to_owned()),
        micros if TIMESTAMP_MICROS.contains(&micros) => {
            let mut text = String::with_capacity(MOMENT_BYTES);
            let era = calendar(&mut text, micros.div_euclid(DAY_MICROS));
            text.push(' ');
            clock(&mut text, micros.rem_euclid(DAY_MICROS).unsigned_abs());
            text.push_str(zone);
            text.push_str(era);
            Ok(text)
        }
        _ => Err(Malformed),
    }
}

/// Room for the longest timestamp. Results have many of them: they are put together digit by digit.
const MOMENT_BYTES: usize = 40;

/// Prints the Gregorian day so many days after 2000-01-01, and returns the suffix of its era.
///
/// Years begin in March here, so that the leap day is the last of its year and every 400 years,
/// from 0000-03-01, are the same 146,097 days.
fn calendar(text: &mut String, days: i64) -> &'static str {
    let days = days + 730_425;
    let (cycle, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Five months from March have 153 days, and so have the next five.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;

    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = cycle * 400 + year + next_year;
    // There is no year zero: it is 1 BC.
    let (year, era) = if year > 0 { (year, "") } else { (1 - year, " BC") };
    digits(text, year.unsigned_abs(), 4);
    text.push('-');
    digits(text, month.unsigned_abs(), 2);
    text.push('-');
    digits(text, day.unsigned_abs(), 2);
    era
}

/// Prints a number with at least so many digits.
fn digits(text: &mut String, number: u64, width: u32) {
    let mut place = 10_u64.pow(width - 1);
    while number / place >= 10 {
        place *= 10;
    }
    while place > 0 {
        // A digit is below ten.
        text.push(char::from(b'0' + u8::try_from(number / place % 10).unwrap_or(0)));
        place /= 10;
    }
}

/// Prints hours, minutes and seconds, with only the fraction that is not zero.
fn clock(text: &mut String, micros: u64) {
    let (seconds, fraction) = (micros / 1_000_000, micros % 1_000_000);
    let (minutes, hours) = (seconds / 60 % 60, seconds / 3_600);
    digits(text, hours, 2);
    text.push(':');
    digits(text, minutes, 2);
    text.push(':');
    digits(text, seconds % 60, 2);
    if fraction > 0 {
        text.push('.');
        digits(text, fraction, 6);
        text.truncate(text.trim_end_matches('0').len());
    }
}

/// A zone's offset, as short as it is exact. It is sent west of UTC and printed east of it.
fn zone(seconds_west: i32) -> String {
    let sign = if seconds_west > 0 { '-' } else { '+' };
    let seconds = seconds_west.unsigned_abs();
    let (hours, minutes, seconds) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    match (minutes, seconds) {
        (0, 0) => format!("{sign}{hours:02}"),
        (_, 0) => format!("{sign}{hours:02}:{minutes:02}"),
        (_, _) => format!("{sign}{hours:02}:{minutes:02}:{seconds:02}"),
    }
}

/// Every expected text was printed by PostgreSQL 15 for the value with these bytes.
#[cfg(test)]
mod tests {
    use super::*;

    type TextForm = fn(&[u8]) -> Result<String, Malformed>;

    const ALL: [TextForm; 8] = [numeric, date, time, timetz, timestamp, timestamptz, interval, uuid];

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: String = hex.split_whitespace().collect();
        let pairs = digits.as_bytes().chunks(2).map(|pair| str::from_utf8(pair).unwrap());
        pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
    }

    #[track_caller]
    fn prints(form: TextForm, table: &[(&str, &str)]) {
        for (hex, text) in table {
            assert_eq!(form(&bytes(hex)).as_deref(), Ok(*text), "{hex}");
        }
    }

    #[track_caller]
    fn refuses(form: TextForm, table: &[&str]) {
        for hex in table {
            assert_eq!(form(&bytes(hex)), Err(Malformed), "{hex}");
        }
    }

    #[test]
    fn numeric_is_exact_and_keeps_its_scale() {
        prints(
            numeric,
            &[
                ("0000 0000 0000 0000", "0"),
                ("0000 0000 0000 0002", "0.00"),
                ("0001 0000 0000 0000 0001", "1"),
                ("0002 0000 0000 0002 0001 1388", "1.50"),
                ("0002 0000 4000 0002 0001 1388", "-1.50"),
                ("0001 0001 0000 0000 0001", "10000"),
                ("0001 0002 0000 0001 0001", "100000000.0"),
                ("0002 0000 0000 0004 270f 270f", "9999.9999"),
                ("0001 ffff 0000 0004 0001", "0.0001"),
                ("0001 fffe 4000 0005 03e8", "-0.00001"),
                ("0006 0002 0000 0009 0001 0929 1a85 0000 0000 03e8", "123456789.000000001"),
                ("0001 0005 0000 0000 0001", "100000000000000000000"),
                ("0001 fffb 0000 0014 0001", "0.00000000000000000001"),
                ("0000 0000 c000 0000", "NaN"),
                ("0000 0000 d000 0020", "Infinity"),
                ("0000 0000 f000 0020", "-Infinity"),
            ],
        );
    }

    #[test]
    fn numeric_drops_what_its_scale_hides_and_has_no_negative_zero() {
        prints(
            numeric,
            &[
                ("0001 ffff 0000 0003 04d2", "0.123"),
                ("0001 ffff 4000 0001 0001", "0.0"),
                ("0002 0001 0000 0000 0000 0007", "7"),
                ("0001 7fff 4000 0000 0000", "0"),
            ],
        );
    }

    #[test]
    fn numeric_reaches_both_ends_of_its_range() {
        let largest_power = format!("1{}", "0".repeat(131_071));
        let smallest_step = format!("0.{}1", "0".repeat(16_382));
        prints(numeric, &[("0001 7fff 0000 0000 03e8", &largest_power), ("0001 f000 0000 3fff 000a", &smallest_step)]);
    }

    #[test]
    fn numeric_refuses_bad_digits_signs_scales_and_counts() {
        refuses(
            numeric,
            &[
                "0001 0000 0000 0000 2710",
                "0001 0000 0000 0000 ffff",
                "0001 0000 8000 0000 0001",
                "0001 0000 0001 0000 0001",
                "0001 0000 0000 4000 0001",
                "0002 0000 0000 0000 0001",
                "0000 0000 0000 0000 0001",
                "0001 0000 0000 0000 0001 00",
                "ffff 7fff 0000 3fff",
            ],
        );
    }

    #[test]
    fn date_prints_every_era_and_refuses_days_outside_them() {
        prints(
            date,
            &[
                ("00000000", "2000-01-01"),
                ("ffffffff", "1999-12-31"),
                ("00002279", "2024-02-29"),
                ("ffff718f", "1900-03-01"),
                ("fff4dbf9", "0001-01-01"),
                ("fff4dbf8", "0001-12-31 BC"),
                ("fff49d7b", "0044-03-15 BC"),
                ("ffda97cd", "4713-01-01 BC"),
                ("ffda97a7", "4714-11-24 BC"),
                ("002c95d4", "10000-01-01"),
                ("7fda970c", "5874897-12-31"),
                ("7fffffff", "infinity"),
                ("80000000", "-infinity"),
            ],
        );
        refuses(date, &["ffda97a6", "7fda970d", "7ffffffe", "80000001"]);
    }

    #[test]
    fn time_trims_its_fraction_and_ends_at_twenty_four() {
        prints(
            time,
            &[
                ("0000000000000000", "00:00:00"),
                ("000000036c97ca88", "04:05:06.789"),
                ("0000000000000001", "00:00:00.000001"),
                ("0000000a8bdba2a0", "12:34:56.1"),
                ("000000141dd75fff", "23:59:59.999999"),
                ("000000141dd76000", "24:00:00"),
            ],
        );
        refuses(time, &["000000141dd76001", "ffffffffffffffff", "8000000000000000"]);
    }

    #[test]
    fn timetz_prints_a_zone_as_short_as_it_is_exact() {
        prints(
            timetz,
            &[
                ("0000000861c46800 00000000", "10:00:00+00"),
                ("0000000861c46800 ffffb2a8", "10:00:00+05:30"),
                ("0000000861c46800 00007080", "10:00:00-08"),
                ("000000000007a120 00000001", "00:00:00.5-00:00:01"),
                ("00000000dde878c0 fffffff6", "01:02:03+00:00:10"),
                ("000000141dd76000 ffff1f01", "24:00:00+15:59:59"),
                ("0000000000000000 0000e0ff", "00:00:00-15:59:59"),
            ],
        );
        refuses(
            timetz,
            &[
                "0000000000000000 0000e100",
                "0000000000000000 ffff1f00",
                "0000000000000000 80000000",
                "000000141dd76001 00000000",
            ],
        );
    }

    #[test]
    fn timestamps_cover_their_range_and_put_the_era_after_the_zone() {
        let table = [
            ("0000000000000000", "2000-01-01 00:00:00", "2000-01-01 00:00:00+00"),
            ("ffffffffffffffff", "1999-12-31 23:59:59.999999", "1999-12-31 23:59:59.999999+00"),
            ("0002b582c47fb120", "2024-02-29 12:00:00.5", "2024-02-29 12:00:00.5+00"),
            ("ff1af9deec5b2000", "0044-03-15 00:00:00 BC", "0044-03-15 00:00:00+00 BC"),
            ("fd0f7cc1411fa000", "4714-11-24 00:00:00 BC", "4714-11-24 00:00:00+00 BC"),
            ("7fffff5bb3b29fff", "294276-12-31 23:59:59.999999", "294276-12-31 23:59:59.999999+00"),
            ("7fffffffffffffff", "infinity", "infinity"),
            ("8000000000000000", "-infinity", "-infinity"),
        ];
        for (hex, without_zone, with_zone) in table {
            prints(timestamp, &[(hex, without_zone)]);
            prints(timestamptz, &[(hex, with_zone)]);
        }
        for form in [timestamp, timestamptz] {
            refuses(form, &["fd0f7cc1411f9fff", "7fffff5bb3b2a000", "8000000000000001"]);
        }
    }

    #[test]
    fn interval_keeps_the_sign_of_every_part() {
        prints(
            interval,
            &[
                ("0000000000000000 00000000 00000000", "00:00:00"),
                ("000000036c97ca88 fffffffd 0000000e", "1 year 2 mons -3 days +04:05:06.789"),
                ("0000000000000000 ffffffff 00000000", "-1 days"),
                ("0000000000000000 00000001 00000000", "1 day"),
                ("0000000000000000 00000000 ffffffff", "-1 mons"),
                ("0000000000000000 00000000 0000000c", "1 year"),
                ("0000000000000000 00000001 fffffff4", "-1 years +1 day"),
                ("00000000000f4240 ffffffff 00000000", "-1 days +00:00:01"),
                ("00000000000f4240 00000001 ffffffff", "-1 mons +1 day 00:00:01"),
                ("fffffffffff0bdc0 00000001 00000000", "1 day -00:00:01"),
                ("ffffffffffffffff 00000000 00000000", "-00:00:00.000001"),
                ("00000014f46b0400 00000000 00000000", "25:00:00"),
                ("7fffffffffffffff 00000000 00000000", "2562047788:00:54.775807"),
                (
                    "7fffffffffffffff 7fffffff 80000000",
                    "-178956970 years -8 mons +2147483647 days 2562047788:00:54.775807",
                ),
                (
                    "8000000000000001 80000000 80000000",
                    "-178956970 years -8 mons -2147483648 days -2562047788:00:54.775807",
                ),
                ("7fffffffffffffff 7fffffff 7fffffff", "infinity"),
                ("8000000000000000 80000000 80000000", "-infinity"),
            ],
        );
    }

    #[test]
    fn uuid_is_hyphenated_lower_case() {
        let table = [("00112233445566778899aabbccddeeff", "00112233-4455-6677-8899-aabbccddeeff")];
        prints(uuid, &table);
    }

    #[test]
    fn truncated_and_overlong_bytes_are_malformed() {
        let zeros = [0; 17];
        for (form, len) in ALL.into_iter().zip([8, 4, 8, 12, 8, 8, 16, 16]) {
            assert!(form(&zeros[..len]).is_ok());
            for wrong in (0..zeros.len()).filter(|wrong| *wrong != len) {
                assert_eq!(form(&zeros[..wrong]), Err(Malformed), "{wrong} bytes");
            }
        }
    }

    #[test]
    fn no_bytes_panic() {
        let mut seed: u64 = 15;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let [byte, odds, ..] = seed.to_be_bytes();
            // Every other byte is zero, so that noise gets past the counts and the ranges.
            if odds % 2 == 0 { 0 } else { byte }
        };
        for _ in 0..10_000 {
            let len = usize::from(next() % 24);
            let noise: Vec<u8> = (0..len).map(|_| next()).collect();
            for form in ALL {
                // Noise may be a value; what it prints is the other tests' promise.
                let _ = form(&noise);
            }
        }
    }
}
