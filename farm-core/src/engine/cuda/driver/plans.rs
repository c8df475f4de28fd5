//! Which way a library computes a matrix product: chosen once for a kind of product, and the same for every number of rows.
//! So the bits of a row do not depend on how many rows there are.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::engine::Result;
use crate::engine::cuda::device::{Dtype, Matmul};

/// Rows that a way has to take before it is chosen. The last, those of a large clip, are what it is chosen for.
const ROWS: [usize; 4] = [1, 3, 256, 8192];
/// No library wants more than this many bytes aligned.
const MOST_ALIGNED: usize = 16;

/// What products have in common that are computed in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    pub columns: usize,
    pub inner: usize,
    pub dtype: Dtype,
    pub bias: bool,
}

impl Kind {
    pub(super) fn of(matmul: &Matmul) -> Self {
        let Matmul { columns, inner, dtype, bias, .. } = *matmul;
        Self { columns, inner, dtype, bias: bias.is_some() }
    }

    /// Bytes that x and weight, and out, are aligned to at every row, if they are at the first.
    pub(super) fn alignment(&self) -> (usize, usize) {
        let of_rows = |values: usize| {
            let bytes = values * self.dtype.bytes();
            MOST_ALIGNED.min(1 << bytes.trailing_zeros().min(8))
        };
        (of_rows(self.inner), of_rows(self.columns))
    }
}

/// A library for products.
pub(super) trait Library {
    /// A way to compute them.
    type Way: Clone;

    /// Ways for a kind, the fastest for this many rows first. None of them may add up parts of a sum in several blocks.
    fn ways(&self, kind: &Kind, rows: usize) -> Result<Vec<Self::Way>>;
    /// Whether a way does for this many rows.
    fn takes(&self, way: &Self::Way, kind: &Kind, rows: usize) -> Result<bool>;
}

/// The ways that were chosen so far; None for kinds that have none.
pub(super) struct Plans<W>(Mutex<HashMap<Kind, Option<W>>>);

impl<W> Default for Plans<W> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<W: Clone> Plans<W> {
    /// How to compute the product; None if the library cannot, or not as it computes others of this kind, or if its
    /// operands lie where no row of a tensor does.
    pub(super) fn way(&self, library: &impl Library<Way = W>, matmul: &Matmul) -> Result<Option<W>> {
        let kind = Kind::of(matmul);
        let (inner, columns) = kind.alignment();
        let aligned = |address: u64, bytes: usize| address.is_multiple_of(bytes as u64);
        let operands = [(matmul.x, inner), (matmul.weight, inner), (matmul.out, columns)];
        let bias = matmul.bias.is_none_or(|bias| aligned(bias, MOST_ALIGNED));
        if !bias || !operands.iter().all(|(address, bytes)| aligned(*address, *bytes)) {
            return Ok(None);
        }
        let mut chosen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let way = match chosen.get(&kind) {
            Some(way) => way.clone(),
            None => {
                let way = choose(library, &kind)?;
                chosen.insert(kind, way.clone());
                way
            }
        };
        drop(chosen);
        match way {
            Some(way) if library.takes(&way, &kind, matmul.rows)? => Ok(Some(way)),
            _ => Ok(None),
        }
    }
}

fn choose<L: Library>(library: &L, kind: &Kind) -> Result<Option<L::Way>> {
    for way in library.ways(kind, ROWS[ROWS.len() - 1])? {
        let mut all = true;
        for rows in ROWS {
            all = all && library.takes(&way, kind, rows)?;
        }
        if all {
            return Ok(Some(way));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Takes so many rows at most with each of its ways, and remembers what it was asked.
    struct Fake {
        most: Vec<usize>,
        asked: RefCell<Vec<(Kind, usize)>>,
    }

    impl Library for Fake {
        type Way = usize;

        fn ways(&self, kind: &Kind, rows: usize) -> Result<Vec<usize>> {
            self.asked.borrow_mut().push((*kind, rows));
            Ok((0..self.most.len()).collect())
        }

        fn takes(&self, way: &usize, _kind: &Kind, rows: usize) -> Result<bool> {
            Ok(rows <= self.most[*way])
        }
    }

    fn fake(most: &[usize]) -> Fake {
        Fake { most: most.to_vec(), asked: RefCell::default() }
    }

    fn product(rows: usize) -> Matmul {
        let dtype = Dtype::Bf16;
        Matmul { x: 256, weight: 512, bias: None, out: 768, rows, columns: 24, inner: 40, dtype }
    }

    #[test]
    fn a_kind_is_asked_for_once_and_computed_in_one_way_whatever_the_rows() {
        let (library, plans) = (fake(&[100_000]), Plans::default());
        for rows in [7, 8192, 1, 50_000] {
            assert_eq!(plans.way(&library, &product(rows)).unwrap(), Some(0), "{rows} rows");
        }
        assert_eq!(*library.asked.borrow(), [(Kind::of(&product(1)), 8192)]);
        // What is not a kind's own does not make it another; what is, does.
        plans.way(&library, &Matmul { x: 1024, ..product(7) }).unwrap();
        assert_eq!(library.asked.borrow().len(), 1);
        for other in [
            Matmul { columns: 32, ..product(7) },
            Matmul { inner: 48, ..product(7) },
            Matmul { dtype: Dtype::F32, ..product(7) },
            Matmul { bias: Some(256), ..product(7) },
        ] {
            let before = library.asked.borrow().len();
            plans.way(&library, &other).unwrap();
            assert_eq!(library.asked.borrow().len(), before + 1, "{other:?}");
        }
    }

    #[test]
    fn a_way_that_does_not_take_all_rows_is_passed_over() {
        let plans = Plans::default();
        let library = fake(&[255, 8192, 100_000]);
        assert_eq!(plans.way(&library, &product(1)).unwrap(), Some(1));
        // Not the third, which would do: rows would have other bits than in smaller products.
        assert_eq!(plans.way(&library, &product(8193)).unwrap(), None);
    }

    #[test]
    fn no_way_is_remembered_too() {
        let (library, plans) = (fake(&[]), Plans::default());
        assert_eq!(plans.way(&library, &product(1)).unwrap(), None);
        assert_eq!(plans.way(&library, &product(2)).unwrap(), None);
        assert_eq!(library.asked.borrow().len(), 1);
    }

    #[test]
    fn operands_that_are_not_aligned_as_rows_are_do_without_the_library() {
        let (library, plans) = (fake(&[100_000]), Plans::default());
        let product = Matmul { bias: Some(64), ..product(2) };
        // 40 values of two bytes: 16. 24 of them: 16. Rows of 20 values are aligned to 8, of 3 to 2.
        assert_eq!(Kind { inner: 20, columns: 3, ..Kind::of(&product) }.alignment(), (8, 2));
        assert_eq!(plans.way(&library, &Matmul { x: 256 + 80, ..product }).unwrap(), Some(0));
        for odd in [
            Matmul { x: 256 + 8, ..product },
            Matmul { weight: 512 + 2, ..product },
            Matmul { out: 768 + 8, ..product },
            Matmul { bias: Some(68), ..product },
        ] {
            assert_eq!(plans.way(&library, &odd).unwrap(), None, "{odd:?}");
        }
        let narrow = Matmul { inner: 20, x: 256 + 8, ..product };
        assert_eq!(plans.way(&library, &narrow).unwrap(), Some(0));
    }
}
