//! A JSON object as a list of entries: unlike a map type it reports a key that occurs twice, and which key was being
//! read when a value turned out wrong.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};

/// A value whose type may depend on its key.
pub(crate) trait EntryValue: Sized {
    /// Reads the value of `key`, which `map` has just returned.
    fn read<'de, A: MapAccess<'de>>(key: &str, map: &mut A) -> Result<Self, A::Error>;
}

impl EntryValue for String {
    fn read<'de, A: MapAccess<'de>>(_key: &str, map: &mut A) -> Result<Self, A::Error> {
        map.next_value()
    }
}

/// Collects the entries of an object, in file order.
///
/// `current` is the key whose value is being read. It stays set when that fails, so the caller can name the entry.
pub(crate) struct Entries<'a, V> {
    current: &'a mut Option<String>,
    value: PhantomData<V>,
}

impl<'a, V> Entries<'a, V> {
    pub(crate) fn new(current: &'a mut Option<String>) -> Self {
        Self { current, value: PhantomData }
    }
}

impl<'de, V: EntryValue> DeserializeSeed<'de> for Entries<'_, V> {
    type Value = Vec<(String, V)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, V: EntryValue> Visitor<'de> for Entries<'_, V> {
    type Value = Vec<(String, V)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            *self.current = Some(key.clone());
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom("the name occurs twice"));
            }
            let value = V::read(&key, &mut map)?;
            entries.push((key, value));
            *self.current = None;
        }
        Ok(entries)
    }
}

/// Entries of an object, or the key being read (if any) and the parser's message with line and column.
pub(crate) type Parsed<V> = Result<Vec<(String, V)>, (Option<String>, serde_json::Error)>;

/// Parses `text`, which must be one JSON object and nothing else.
pub(crate) fn parse_object<V: EntryValue>(text: &[u8]) -> Parsed<V> {
    let mut current = None;
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    Entries::new(&mut current)
        .deserialize(&mut deserializer)
        .and_then(|entries| deserializer.end().map(|()| entries))
        .map_err(|error| (current, error))
}

/// A `T` written as an object. Derived structs would also take their fields as an array, in order.
pub(crate) struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OnlyMap<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for OnlyMap<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(OnlyMap(PhantomData))
    }
}
