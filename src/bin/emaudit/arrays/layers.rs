//! Where the rows of one layer lie in an array.

use super::Array;
use emaudit::directions::Directions;
use emaudit::directions::schema::Site;
use emaudit::{Error, Result};

/// Where the rows of the layer lie in the array.
pub struct Layout {
    pub rows: usize,
    pub width: usize,
    pub stride: usize,
    pub offset: usize,
}

/// Which numbers of the array are rows of the layer.
pub fn layout(array: &Array, directions: &Directions, layer: u32) -> Result<Layout> {
    let (width, blocks) = (directions.width(), directions.manifest().model.n_layers as usize);
    let (rows, layers, found) = match *array.shape() {
        [rows, cols] => (rows, None, cols),
        [rows, layers, cols] => (rows, Some(layers), cols),
        ref other => {
            let sentence =
                format_args!("its shape is {other:?}, give [rows, width] or [rows, layers, width]");
            return Err(array.refuse(sentence));
        }
    };
    if found != width {
        return Err(Error::WidthMismatch { expected: width, found });
    }
    if rows == 0 {
        return Err(array.refuse("it has no rows, so nothing can be said of them"));
    }
    if layers.is_some() && directions.manifest().site == Site::FinalNorm {
        return Err(array.refuse(
            "the layers of [rows, layers, width] are block outputs, and these directions were taken after the final norm; \
             save the rows after it as [rows, width]",
        ));
    }
    match layers {
        None => Ok(Layout { rows, width, stride: width, offset: 0 }),
        Some(n) if n == blocks => {
            Ok(Layout { rows, width, stride: n * width, offset: layer as usize * width })
        }
        Some(n) if n == blocks + 1 => Err(array.refuse(format_args!(
            "it has {n} layers and the model {blocks} blocks: hidden_states of transformers begin with the embeddings and \
             end after the final norm; save [:, 1:] of them, and only for layers below {}",
            blocks - 1
        ))),
        Some(n) => Err(array.refuse(format_args!("it has {n} layers, the model has {blocks} blocks"))),
    }
}
