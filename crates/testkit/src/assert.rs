//! Numeric assertions that report the error they measured.

/// The largest `|actual - expected|` divided by the largest `|expected|`, and the index where it occurs.
///
/// A NaN or infinity in `actual` that `expected` does not have counts as infinite error; with all of `expected` zero the
/// error is absolute.
///
/// # Panics
/// When the lengths differ.
pub fn max_relative_to_max(name: &str, actual: &[f32], expected: &[f32]) -> (f32, usize) {
    assert_eq!(actual.len(), expected.len(), "{name}: {} values, expected {}", actual.len(), expected.len());
    let scale = expected.iter().fold(0f64, |max, &e| max.max(f64::from(e).abs()));
    let scale = if scale > 0.0 { scale } else { 1.0 };
    let mut worst = (0f64, 0);
    for (index, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let same = a == e || (a.is_nan() && e.is_nan());
        let delta = if same { 0.0 } else { (f64::from(a) - f64::from(e)).abs() / scale };
        let delta = if delta.is_nan() { f64::INFINITY } else { delta };
        if delta > worst.0 {
            worst = (delta, index);
        }
    }
    (worst.0 as f32, worst.1)
}

/// Asserts that `actual` is within `relative_to_max` of `expected`, measured by [`max_relative_to_max`]; prints the
/// measured error (visible with `--nocapture` or on failure) and returns it.
///
/// # Panics
/// When the lengths differ, the error is larger, or `expected` is not finite.
pub fn assert_close(name: &str, actual: &[f32], expected: &[f32], relative_to_max: f32) -> f32 {
    if let Some(index) = expected.iter().position(|e| !e.is_finite()) {
        panic!("{name}: expected[{index}] is {}: the reference itself is broken", expected[index]);
    }
    let (error, index) = max_relative_to_max(name, actual, expected);
    println!(
        "{name}: max|d|/max|expected| = {error:.3e} over {} values (limit {relative_to_max:.1e})",
        expected.len()
    );
    assert!(
        error <= relative_to_max,
        "{name}: max|d|/max|expected| = {error:.3e} exceeds {relative_to_max:.1e} at [{index}] of {}: {} instead of {}",
        expected.len(),
        actual[index],
        expected[index],
    );
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_relative_to_the_largest_expected_value() {
        let (error, index) = max_relative_to_max("x", &[1.0, -4.0, 0.5], &[1.0, -4.0, 0.1]);
        assert!((error - 0.1).abs() < 1e-6 && index == 2, "{error} {index}");
        assert_eq!(max_relative_to_max("x", &[0.0, 0.25], &[0.0, 0.0]), (0.25, 1));
        assert_eq!(max_relative_to_max("x", &[f32::NAN, 1.0], &[0.0, 1.0]).0, f32::INFINITY);
        assert_eq!(max_relative_to_max("x", &[f32::INFINITY], &[1.0]).0, f32::INFINITY);
        assert_eq!(assert_close("x", &[1.0], &[1.0], 0.0), 0.0);
    }

    #[test]
    fn failures_are_failures() {
        let fails = |actual: &'static [f32], expected: &'static [f32]| {
            std::panic::catch_unwind(move || assert_close("x", actual, expected, 1e-3)).is_err()
        };
        assert!(fails(&[1.1], &[1.0]));
        assert!(fails(&[f32::NAN], &[1.0]));
        assert!(fails(&[1.0], &[1.0, 2.0]));
        assert!(fails(&[f32::NAN], &[f32::NAN]));
        assert!(!fails(&[1.0005], &[1.0]));
    }
}
