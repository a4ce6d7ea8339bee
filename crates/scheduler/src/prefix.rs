//! Names of KV blocks by what is in them: a hash chain, so that a block's name says everything that precedes it, too.

use sha2::{Digest, Sha256};

use crate::config::CacheIdentity;
use crate::request::KeyId;

/// SHA-256 over the parent's hash and the block's token ids. Compared whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(pub [u8; 32]);

/// Who may reuse the KV blocks of a request. Sharing beyond a key tells one client by its time to the first token what others
/// have asked (arXiv 2409.20002), so it is asked for, never assumed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CacheScope {
    /// Requests of the same key.
    #[default]
    Key,
    /// Requests of all keys that say so.
    Shared,
    /// Nobody, and the request reuses nothing.
    Off,
}

/// The hash before the first block of a sequence: whatever cached KV depends on beside the tokens. Fields are of fixed length or
/// preceded by it, so that no two sets of fields give the same bytes.
pub fn root_hash(
    identity: &CacheIdentity,
    block_size: usize,
    scope: &CacheScope,
    key: KeyId,
    salt: &[u8],
) -> BlockHash {
    let mut hasher = Sha256::new();
    hasher.update(b"longhaul kv prefix 1");
    hasher.update(identity.secret);
    hasher.update((block_size as u64).to_le_bytes());
    let (tag, key) = match scope {
        CacheScope::Key => (0u8, key.0),
        CacheScope::Shared => (1, 0),
        CacheScope::Off => (2, key.0),
    };
    hasher.update([tag]);
    hasher.update(key.to_le_bytes());
    for field in [identity.model.as_bytes(), identity.positions.as_bytes(), salt] {
        hasher.update((field.len() as u64).to_le_bytes());
        hasher.update(field);
    }
    BlockHash(hasher.finalize().into())
}

/// The hash of a full block that follows the block of hash `parent`.
pub fn block_hash(parent: BlockHash, tokens: impl IntoIterator<Item = u32>) -> BlockHash {
    let mut hasher = Sha256::new();
    hasher.update(parent.0);
    let ids: Vec<u8> = tokens.into_iter().flat_map(u32::to_le_bytes).collect();
    hasher.update(&ids);
    BlockHash(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn everything_that_kv_depends_on_changes_the_root() {
        let identity = CacheIdentity { secret: [7; 32], model: "m".into(), positions: "p".into() };
        let root =
            |i: &CacheIdentity, size, scope, key, salt: &[u8]| root_hash(i, size, &scope, KeyId(key), salt);
        let mut seen = BTreeSet::new();
        assert!(seen.insert(root(&identity, 16, CacheScope::Key, 1, b"")));
        assert!(seen.insert(root(&identity, 32, CacheScope::Key, 1, b"")));
        assert!(seen.insert(root(&identity, 16, CacheScope::Key, 2, b"")));
        assert!(seen.insert(root(&identity, 16, CacheScope::Key, 1, b"salt")));
        assert!(seen.insert(root(&identity, 16, CacheScope::Shared, 1, b"")));
        assert!(!seen.insert(root(&identity, 16, CacheScope::Shared, 2, b"")), "shared means shared");
        for changed in [
            CacheIdentity { secret: [8; 32], ..identity.clone() },
            CacheIdentity { model: "mp".into(), positions: String::new(), ..identity.clone() },
            CacheIdentity { model: String::new(), positions: "mp".into(), ..identity.clone() },
        ] {
            assert!(seen.insert(root(&changed, 16, CacheScope::Key, 1, b"")));
        }
    }

    /// Against the bytes hashed in one go, as another implementation would.
    #[test]
    fn a_block_hash_is_sha256_of_parent_and_little_endian_ids() {
        let parent = BlockHash([3; 32]);
        let mut bytes = vec![3u8; 32];
        bytes.extend([1, 0, 0, 0, 0, 2, 0, 0]);
        let expected: [u8; 32] = Sha256::digest(&bytes).into();
        assert_eq!(block_hash(parent, [1, 512]).0, expected);
    }
}
