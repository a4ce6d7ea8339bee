//! `/openapi.json`.

use serde_json::{Map, Value, json};

use crate::router::{Access, ROUTES};

/// The document.
pub(crate) fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        let _ = (route.path, route.access == Access::Key, &mut paths);
    }
    json!({"openapi": "3.1.0", "paths": paths})
}
