use std::sync::Arc;

use crate::arena::Range;
use crate::driver::{DevicePtr, Element};

/// An activation of the current step: `[rows, cols]`, row-major. Cloning shares the memory.
#[derive(Clone)]
pub struct Tensor {
    range: Arc<Range>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements between the starts of rows: `cols` rounded up so that rows are aligned to 16 bytes. What lies between
    /// `cols` and `stride` is undefined.
    pub stride: usize,
    /// Element type.
    pub element: Element,
}

/// `cols` rounded up to whole 16-byte units of `element`.
pub fn padded_cols(cols: usize, element: Element) -> usize {
    cols.next_multiple_of(16 / element.size())
}

impl Tensor {
    /// Wraps a range that holds `rows * padded_cols(cols)` elements.
    pub(crate) fn new(range: Range, rows: usize, cols: usize, element: Element) -> Self {
        Self { range: Arc::new(range), rows, cols, stride: padded_cols(cols, element), element }
    }

    /// The first `rows` rows, sharing the memory; at most all of them.
    pub fn first_rows(&self, rows: usize) -> Tensor {
        Tensor { rows: rows.min(self.rows), ..self.clone() }
    }

    /// Address of the first element.
    pub fn address(&self) -> DevicePtr {
        self.range.address()
    }

    /// Address of row `row`.
    pub fn row_address(&self, row: usize) -> DevicePtr {
        self.range.address().offset(row * self.stride * self.element.size())
    }
}
