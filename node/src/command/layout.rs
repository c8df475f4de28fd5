//! Volumes of reference files have their channels first, those of the decoder last.

/// `[C, …] → […, C]`
pub fn channels_last(values: &[f32], channels: usize) -> Vec<f32> {
    transpose(values, channels, values.len() / channels.max(1))
}

/// `[…, C] → [C, …]`
pub fn channels_first(values: &[f32], channels: usize) -> Vec<f32> {
    transpose(values, values.len() / channels.max(1), channels)
}

/// `[rows, columns] → [columns, rows]`
fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| values[(i % rows) * columns + i / rows]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_move_to_the_end_and_back() {
        let values: Vec<f32> = (0..12).map(|x| x as f32).collect();
        let last = channels_last(&values, 3);
        assert_eq!(&last[..3], [0.0, 4.0, 8.0]);
        assert_eq!(channels_first(&last, 3), values);
    }
}
