//! The cells of a run and the fact that each one hides.

use std::collections::HashSet;

use longhaul_engine::LongContext;

use super::config::{Grid, NeedleConfig, depth_key};
use super::report::CellKey;
use crate::Result;

/// Names for `{city}`.
const CITIES: [&str; 40] = [
    "London",
    "Paris",
    "Berlin",
    "Madrid",
    "Rome",
    "Vienna",
    "Prague",
    "Warsaw",
    "Athens",
    "Lisbon",
    "Dublin",
    "Oslo",
    "Helsinki",
    "Stockholm",
    "Cairo",
    "Nairobi",
    "Lagos",
    "Accra",
    "Delhi",
    "Mumbai",
    "Tehran",
    "Ankara",
    "Istanbul",
    "Beijing",
    "Shanghai",
    "Tokyo",
    "Osaka",
    "Kyoto",
    "Seoul",
    "Hanoi",
    "Bangkok",
    "Manila",
    "Jakarta",
    "Sydney",
    "Melbourne",
    "Toronto",
    "Chicago",
    "Lima",
    "Quito",
    "Havana",
];

/// One hidden fact: needle, question and answer, templates filled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fact {
    pub(crate) needle: String,
    pub(crate) question: String,
    pub(crate) expected: Vec<String>,
}

impl Fact {
    pub(crate) fn fill(config: &NeedleConfig, city: &str, code: &str) -> Self {
        let fill = |template: &str| template.trim().replace("{city}", city).replace("{code}", code);
        Self {
            needle: fill(&config.needle),
            question: fill(&config.question),
            expected: config.expect.iter().map(|e| fill(e)).collect(),
        }
    }
}

/// One question of the grid.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PlannedCell {
    pub(crate) mode: LongContext,
    pub(crate) length: usize,
    pub(crate) depth: f32,
    pub(crate) instance: usize,
    pub(crate) control: bool,
    pub(crate) fact: Fact,
}

impl PlannedCell {
    pub(crate) fn key(&self) -> CellKey {
        (self.mode.to_string(), self.length, depth_key(self.depth), self.instance, self.control)
    }
}

/// All cells, by mode, then by length, depth and instance, each followed by its control.
///
/// The facts do not depend on the mode, so that modes are compared on equal prompts. A code is drawn from the seed and
/// the cell's place and drawn again while another cell has it or the haystack contains it.
pub(crate) fn plan(config: &NeedleConfig) -> Result<(Grid, Vec<PlannedCell>)> {
    let grid = config.grid()?;
    let mut facts = Vec::new();
    let mut used = HashSet::new();
    for &length in &grid.lengths {
        for &depth in &grid.depths {
            for instance in 0..grid.instances {
                let mut random =
                    Random::new(&[config.seed, length as u64, u64::from(depth_key(depth)), instance as u64]);
                let city = CITIES.get(random.below(CITIES.len())).copied().unwrap_or("Oslo");
                let mut code = random.code();
                // 90,000 codes: a grid that uses them up is far beyond what anyone can run, but must still end.
                for _ in 0..1000 {
                    if !used.contains(&code) && !config.haystack.contains(&code) {
                        break;
                    }
                    code = random.code();
                }
                facts.push((length, depth, instance, Fact::fill(config, city, &code)));
                used.insert(code);
            }
        }
    }
    let mut cells = Vec::new();
    for &mode in &grid.modes {
        for (length, depth, instance, fact) in &facts {
            for control in [false, true] {
                if !control || grid.control {
                    let (length, depth, instance) = (*length, *depth, *instance);
                    cells.push(PlannedCell { mode, length, depth, instance, control, fact: fact.clone() });
                }
            }
        }
    }
    Ok((grid, cells))
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(parts: &[u64]) -> Self {
        let mut random = Self(0x6c6f_6e67_6861_756c);
        for &part in parts {
            random.0 ^= part;
            random.0 = random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly from 0 to `n` − 1 (0 for n = 0): the high half of a 128-bit product.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// Five digits, the first not 0.
    fn code(&mut self) -> String {
        (10_000 + self.below(90_000)).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NeedleConfig {
        NeedleConfig {
            lengths: (1..=16).map(|i| i * 8192).collect(),
            modes: vec![LongContext::None, LongContext::Dca],
            haystack: "Text.".into(),
            instances: 4,
            ..NeedleConfig::default()
        }
    }

    #[test]
    fn no_two_cells_share_an_answer_and_modes_share_prompts() {
        let (_, cells) = plan(&config()).unwrap();
        assert_eq!(cells.len(), 2 * 16 * 11 * 4);
        let (none, dca) = cells.split_at(cells.len() / 2);
        let codes: HashSet<_> = none.iter().map(|c| &c.fact.expected[0]).collect();
        assert_eq!(codes.len(), none.len());
        assert!(none.iter().zip(dca).all(|(a, b)| a.fact == b.fact && a.mode != b.mode));
        let cities: HashSet<_> = none.iter().map(|c| &c.fact.question).collect();
        assert_eq!(cities.len(), CITIES.len());
    }

    #[test]
    fn codes_of_the_haystack_are_not_used() {
        let first = plan(&config()).unwrap().1[0].fact.expected[0].clone();
        let with = NeedleConfig { haystack: format!("The number {first}."), ..config() };
        assert_ne!(plan(&with).unwrap().1[0].fact.expected[0], first);
    }

    #[test]
    fn a_cell_keeps_its_fact_when_the_grid_grows() {
        let small = NeedleConfig { lengths: vec![8192], depths: vec![50.0], instances: 1, ..config() };
        let fact = &plan(&small).unwrap().1[0].fact;
        let (_, cells) = plan(&config()).unwrap();
        let same = cells.iter().find(|c| c.length == 8192 && c.depth == 50.0 && c.instance == 0).unwrap();
        assert_eq!(&same.fact, fact);
    }

    #[test]
    fn the_seed_changes_the_facts() {
        let other = NeedleConfig { seed: 1, ..config() };
        assert_ne!(plan(&other).unwrap().1[0].fact, plan(&config()).unwrap().1[0].fact);
    }
}
