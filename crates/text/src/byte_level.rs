//! GPT-2's byte alphabet: every byte has one printable character, so that a vocabulary of byte strings can be
//! written as JSON text (`encoder.py`, `bytes_to_unicode`).

/// The character that stands for `byte` in a byte-level vocabulary.
pub(crate) fn byte_to_char(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        // The other 68 bytes take U+0100.. in ascending order.
        0x00..=0x20 => shifted(u32::from(byte)),
        0x7F..=0xA0 => shifted(u32::from(byte) - 0x7F + 0x21),
        0xAD => shifted(0x43),
    }
}

fn shifted(offset: u32) -> char {
    char::from_u32(0x100 + offset).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte that `character` stands for, or none when it is not in the alphabet.
pub(crate) fn char_to_byte(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published construction, written down literally.
    fn published() -> Vec<(u8, char)> {
        let mut bytes: Vec<u32> = (0x21..=0x7E).chain(0xA1..=0xAC).chain(0xAE..=0xFF).collect();
        let mut chars = bytes.clone();
        let mut n = 0;
        for b in 0..256 {
            if !bytes.contains(&b) {
                bytes.push(b);
                chars.push(256 + n);
                n += 1;
            }
        }
        bytes.into_iter().zip(chars).map(|(b, c)| (b as u8, char::from_u32(c).unwrap())).collect()
    }

    #[test]
    fn matches_the_published_table_in_both_directions() {
        let table = published();
        assert_eq!(table.len(), 256);
        for (byte, character) in table {
            assert_eq!(byte_to_char(byte), character, "byte {byte:#x}");
            assert_eq!(char_to_byte(character), Some(byte), "character {character:?}");
        }
    }

    #[test]
    fn characters_outside_the_alphabet_have_no_byte() {
        let valid: Vec<char> = published().into_iter().map(|(_, c)| c).collect();
        for c in (0..0x3000).filter_map(char::from_u32).filter(|c| !valid.contains(c)) {
            assert_eq!(char_to_byte(c), None, "{c:?}");
        }
    }
}
