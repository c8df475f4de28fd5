//! What of the farm is looked at, and the keys that change it.

use crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::widgets::TableState;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tab {
    #[default]
    Devices,
    Running,
    Waiting,
    Tenants,
}

impl Tab {
    pub const ALL: [Self; 4] = [Self::Devices, Self::Running, Self::Waiting, Self::Tenants];

    pub fn title(self) -> &'static str {
        match self {
            Self::Devices => "devices",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Tenants => "tenants",
        }
    }

    pub fn index(self) -> usize {
        self as usize
    }

    /// `by` tables to the right, going round.
    fn step(self, by: usize) -> Self {
        Self::ALL[(self.index() + by) % Self::ALL.len()]
    }
}

/// The table that is shown, and the row that is marked.
#[derive(Debug, Default)]
pub struct Look {
    pub tab: Tab,
    pub table: TableState,
    /// Rows that fitted when it was drawn last.
    pub page: usize,
}

impl Look {
    /// True if the user wants to leave.
    pub fn take(&mut self, event: &Event) -> bool {
        let Event::Key(KeyEvent { code, modifiers, kind, .. }) = event else { return false };
        if *kind == KeyEventKind::Release {
            return false;
        }
        let row = self.table.selected().unwrap_or(0);
        let page = self.page.max(1);
        match code {
            KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Tab | KeyCode::Right => self.turn(1),
            KeyCode::BackTab | KeyCode::Left => self.turn(Tab::ALL.len() - 1),
            KeyCode::Down => self.table.select(Some(row.saturating_add(1))),
            KeyCode::Up => self.table.select(Some(row.saturating_sub(1))),
            KeyCode::PageDown => self.table.select(Some(row.saturating_add(page))),
            KeyCode::PageUp => self.table.select(Some(row.saturating_sub(page))),
            KeyCode::Home => self.table.select(Some(0)),
            KeyCode::End => self.table.select(Some(usize::MAX)),
            _ => {}
        }
        false
    }

    /// Keeps the mark within a table of so many rows.
    pub fn clamp(&mut self, rows: usize) {
        let row = self.table.selected().map(|row| row.min(rows.saturating_sub(1)));
        self.table.select(row.filter(|_| rows > 0));
    }

    fn turn(&mut self, by: usize) {
        self.tab = self.tab.step(by);
        self.table = TableState::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(look: &mut Look, code: KeyCode, modifiers: KeyModifiers) -> bool {
        look.take(&Event::Key(KeyEvent::new(code, modifiers)))
    }

    #[test]
    fn q_escape_and_control_c_leave() {
        let mut look = Look::default();
        assert!(press(&mut look, KeyCode::Char('q'), KeyModifiers::NONE));
        assert!(press(&mut look, KeyCode::Esc, KeyModifiers::NONE));
        assert!(press(&mut look, KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(!press(&mut look, KeyCode::Char('c'), KeyModifiers::NONE));
        assert!(!look.take(&Event::Resize(1, 1)));
    }

    #[test]
    fn tables_go_round_in_both_directions() {
        let mut look = Look::default();
        for expected in [Tab::Running, Tab::Waiting, Tab::Tenants, Tab::Devices] {
            press(&mut look, KeyCode::Tab, KeyModifiers::NONE);
            assert_eq!(look.tab, expected);
        }
        press(&mut look, KeyCode::Left, KeyModifiers::NONE);
        assert_eq!(look.tab, Tab::Tenants);
    }

    #[test]
    fn the_mark_stays_within_the_table() {
        let mut look = Look { page: 10, ..Look::default() };
        let mut rows = |code, rows| {
            press(&mut look, code, KeyModifiers::NONE);
            look.clamp(rows);
            look.table.selected()
        };
        assert_eq!(rows(KeyCode::Up, 3), Some(0));
        assert_eq!(rows(KeyCode::PageDown, 3), Some(2));
        assert_eq!(rows(KeyCode::Down, 3), Some(2));
        assert_eq!(rows(KeyCode::Home, 3), Some(0));
        assert_eq!(rows(KeyCode::End, 100), Some(99));
        assert_eq!(rows(KeyCode::PageUp, 100), Some(89));
        assert_eq!(rows(KeyCode::PageUp, 0), None);
    }
}
