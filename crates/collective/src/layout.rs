//! Where things lie in the memory of a group, in 32-bit words.
//!
//! ```text
//! header | one control block a rank | slots: rank 0 even, rank 0 odd, rank 1 even, …
//! ```

/// Words of the header.
const HEADER: usize = 128;
/// Words of a rank's control block: two cache lines, so that ranks do not share one.
const CONTROL: usize = 32;
/// Longest message a failure is recorded with, bytes.
pub const MESSAGE_BYTES: usize = 240;

/// Identifies a group's memory and the version of this layout.
pub const MAGIC: u32 = 0x4c48_0001;

// Header.
pub const WORD_MAGIC: usize = 0;
pub const WORD_WORLD: usize = 1;
pub const WORD_SLOT: usize = 2;
/// 0, or 1 while the first failure is being written, or 2 when it can be read.
pub const WORD_FAILURE: usize = 16;
pub const WORD_FAILURE_KIND: usize = 17;
pub const WORD_FAILURE_RANK: usize = 18;
/// Ranks that did not arrive, one bit a rank (two words).
pub const WORD_FAILURE_MISSING: usize = 19;
pub const WORD_FAILURE_BYTES: usize = 21;
pub const WORD_FAILURE_MESSAGE: usize = 32;

// Control block of a rank.
/// Number of the last exchange the rank has published.
pub const CONTROL_ARRIVED: usize = 0;
/// Ranks that sleep on `CONTROL_ARRIVED`.
pub const CONTROL_SLEEPERS: usize = 1;
/// 0 before it joined, 1, or 2 after it left.
pub const CONTROL_STATE: usize = 2;
/// Process id.
pub const CONTROL_PROCESS: usize = 3;
/// Description of the call, four words for even and four for odd exchanges.
pub const CONTROL_CALL: usize = 16;
pub const CALL_WORDS: usize = 4;

/// Ranks at most: [`WORD_FAILURE_MISSING`] has a bit for each.
pub const MAX_WORLD_SIZE: usize = 64;

/// Sizes of a group's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub world_size: usize,
    /// Words of one slot.
    pub slot: usize,
}

impl Layout {
    pub fn words(self) -> usize {
        self.slot_at(self.world_size, 0)
    }

    pub fn control(self, rank: usize) -> usize {
        HEADER + rank * CONTROL
    }

    /// First word of the slot of `rank` for exchanges of the given parity.
    pub fn slot_at(self, rank: usize, parity: usize) -> usize {
        HEADER + self.world_size * CONTROL + (2 * rank + parity) * self.slot
    }
}

const _: () = assert!(WORD_FAILURE_MESSAGE * 4 + MESSAGE_BYTES <= HEADER * 4);
const _: () = assert!(CONTROL_CALL + 2 * CALL_WORDS <= CONTROL);
