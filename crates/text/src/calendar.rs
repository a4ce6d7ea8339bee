//! Dates in UTC, for chat templates and logs.

/// Year, month, day of the month and day of the year, of a day counted from 1970-01-01 in the Gregorian calendar.
pub fn civil_date(days: u64) -> (u64, u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Whole 400-year cycles first, so that the loops below are short for any clock.
    let mut year = 1970 + days / 146_097 * 400;
    let mut rest = days % 146_097;
    while rest >= 365 + u64::from(leap(year)) {
        rest -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = rest + 1;
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month.min(12), rest + 1, day_of_year)
}
