//! Values of arguments that are more than a number or a name.

use std::time::Duration;

use longhaul_engine::EmulatedOptions;

/// Above 0 and at most 1.
pub fn fraction(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(fraction) if fraction > 0.0 && fraction <= 1.0 => Ok(fraction),
        _ => Err("expected a fraction above 0 and at most 1, such as 0.9".into()),
    }
}

/// `seed=N`, `copies=eager|lazy`, `blocks=N` (in flight), `sm=80|89|90`, `multiprocessors=N`, separated by commas.
pub fn emulator_options(text: &str) -> Result<EmulatedOptions, String> {
    let mut options = EmulatedOptions::default();
    for setting in text.split(',').filter(|s| !s.is_empty()) {
        let (key, value) = setting.split_once('=').ok_or_else(|| format!("{setting:?} is not KEY=VALUE"))?;
        let number = || match value.parse::<u32>() {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(format!("{key}: expected a positive number, got {value:?}")),
        };
        match (key, value) {
            ("seed", _) => options.seed = number()?.into(),
            ("blocks", _) => options.resident_blocks = number()?,
            ("sm", _) => options.compute_capability = number()?,
            ("multiprocessors", _) => options.multiprocessors = number()?,
            ("copies", "eager") => options.eager = true,
            ("copies", "lazy") => options.eager = false,
            ("copies", _) => return Err(format!("copies: eager or lazy, got {value:?}")),
            _ => return Err(format!("{key:?} is none of seed, copies, blocks, sm, multiprocessors")),
        }
    }
    Ok(options)
}

/// `4096`, `32k` (= 32,768) or `1m` (= 1,048,576).
pub fn token_count(text: &str) -> Result<usize, String> {
    let lower = text.to_ascii_lowercase();
    let (digits, unit) = match lower.strip_suffix('k') {
        Some(digits) => (digits, 1 << 10),
        None => lower.strip_suffix('m').map_or((lower.as_str(), 1), |digits| (digits, 1 << 20)),
    };
    let count: Option<usize> = digits.parse().ok().and_then(|n: usize| n.checked_mul(unit));
    count.ok_or_else(|| "expected a number of tokens such as 4096, 32k or 1m".into())
}

/// Seconds, such as 30 or 0.5, above 0 and at most a day.
pub fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 86_400.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected seconds above 0 and at most 86400, such as 30 or 0.5".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_counts_take_units() {
        assert_eq!(token_count("4096"), Ok(4096));
        assert_eq!(token_count("128K"), Ok(131_072));
        assert_eq!(token_count("1m"), Ok(1_048_576));
        for bad in ["", "k", "-1", "1.5k", "12q"] {
            assert!(token_count(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn fractions_and_seconds_have_ranges() {
        assert_eq!(fraction("0.5"), Ok(0.5));
        for bad in ["0", "-1", "1.5", "NaN", "x"] {
            assert!(fraction(bad).is_err(), "{bad}");
        }
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["0", "-1", "1e9", "NaN", "inf", "5s"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
