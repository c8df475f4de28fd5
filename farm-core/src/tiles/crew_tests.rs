use std::collections::{BTreeMap, HashSet, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::tiles::hand::{Hand, Todo};
use crate::tiles::plan::TilePlan;
use crate::tiles::shape::NormShape;

fn plan(tiling: &str, latent: [usize; 2]) -> TilePlan {
    tiling.parse::<crate::tiles::plan::Tiling>().unwrap().plan(latent, 1).unwrap()
}

/// Tiles of 2×2 in a row; norms with one group and one value a pixel.
fn shape(tiles: usize, norms: usize, frames: &[u32]) -> Arc<Shape> {
    let norm = NormShape { frames: [1, 1], groups: 1, per_pixel: 1 };
    let plan = plan(if norms == 0 { "independent:2x2+0" } else { "2x2+0" }, [2, 2 * tiles]);
    assert_eq!(plan.tiles.len(), tiles);
    Arc::new(Shape::new(plan, frames.to_vec(), vec![norm; norms]))
}

/// The sums of a tile at a step, different for each.
fn sums(shape: &Shape, number: u32, step: u32) -> Sums {
    match shape.exchange() {
        true => Sums { count: 4, moments: vec![[f64::from(100 * step + number), 0.0]] },
        false => Sums::default(),
    }
}

fn pixels(shape: &Shape, number: u32, chunk: u32) -> Pixels {
    let tile = shape.plan.tiles[number as usize];
    let value = 100 * chunk + number;
    match shape.plan.tiles.len() {
        1 => Pixels::Rgb8(vec![value as u8; shape.pixel_values(tile, chunk)]),
        _ => Pixels::Rgb16(vec![value as u16; shape.pixel_values(tile, chunk)]),
    }
}

/// A device that computes at once, and both directions of its connection.
#[derive(Clone, Debug)]
struct Device {
    hand: Hand,
    inbox: VecDeque<ToHand>,
    outbox: VecDeque<FromHand>,
    joined: bool,
    /// The crew has hung up.
    dismissed: bool,
}

#[derive(Clone, Debug)]
struct World {
    shape: Arc<Shape>,
    crew: Crew,
    now: Instant,
    devices: BTreeMap<HandId, Device>,
    next_hand: HandId,
    /// Rounds that nobody has answered.
    asked: u32,
    /// Chunks on their way through the encoder.
    encoding: VecDeque<u32>,
    emitted: u32,
    ended: Option<Result<(), String>>,
    crashes: u32,
    repeats: u32,
    stalls: u32,
    hedges: u32,
    history: Vec<String>,
}

/// What may happen next.
#[derive(Clone, Copy, Debug)]
enum Move {
    /// So many hands are announced.
    Answer(usize),
    Join(HandId),
    ToHand(HandId),
    ToCrew(HandId),
    Encoded,
    /// The hand dies: what it has said and was told is lost, all or in part.
    Crash(HandId),
    /// The hand's next message arrives twice.
    Repeat(HandId),
    /// The crew loses its patience with whatever it waits for.
    Stall,
    /// A tile gets a second hand.
    Hedge(u32, HandId),
}

impl Move {
    /// Happens by itself, sooner or later.
    fn is_progress(&self) -> bool {
        !matches!(self, Self::Crash(_) | Self::Stall | Self::Hedge(..) | Self::Repeat(_))
    }
}

impl World {
    fn new(shape: Arc<Shape>, now: Instant) -> Self {
        let patience = Patience { rounds: 4, ..Patience::default() };
        let crew = Crew::new(shape.clone(), patience, now);
        let mut world = Self {
            shape,
            crew,
            now,
            devices: BTreeMap::new(),
            next_hand: 0,
            asked: 0,
            encoding: VecDeque::new(),
            emitted: 0,
            ended: None,
            crashes: 0,
            repeats: 0,
            stalls: 0,
            hedges: 0,
            history: Vec::new(),
        };
        world.tell(Event::Tick);
        world
    }

    fn tell(&mut self, event: Event) {
        let actions = self.crew.on(event, self.now);
        self.follow(actions);
        // No statistic is ever mixed: the totals are those of one sum from each tile.
        if self.shape.exchange() {
            for (step, totals) in (0..).zip(&self.crew.log) {
                let given: Vec<Sums> =
                    (0..self.shape.plan.tiles.len() as u32).map(|tile| sums(&self.shape, tile, step)).collect();
                assert_eq!(**totals, merge(&given).unwrap(), "step {step}");
            }
        }
    }

    fn follow(&mut self, actions: Vec<Action>) {
        for action in actions {
            assert_eq!(self.ended, None, "{action:?} after the end");
            match action {
                Action::Send(hand, message) => {
                    let device = self.devices.get_mut(&hand);
                    device.into_iter().for_each(|device| device.inbox.push_back(message.clone()));
                }
                Action::Dismiss { hand, .. } => {
                    self.devices.get_mut(&hand).into_iter().for_each(|device| device.dismissed = true);
                }
                Action::Chunk { chunk, tiles } => {
                    assert_eq!(chunk, self.emitted, "chunks come in order, each once");
                    let expected: Vec<Arc<Pixels>> =
                        (0..tiles.len() as u32).map(|tile| Arc::new(pixels(&self.shape, tile, chunk))).collect();
                    assert_eq!(tiles, expected, "chunk {chunk}");
                    self.emitted += 1;
                    self.encoding.push_back(chunk);
                    assert!(self.encoding.len() <= WINDOW as usize, "nothing runs ahead of the encoder");
                }
                Action::WantHands { .. } => self.asked += 1,
                Action::Note(note) => self.history.push(note),
                Action::Finished => self.ended = Some(Ok(())),
                Action::Failed(reason) => self.ended = Some(Err(reason)),
            }
        }
    }

    fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        if self.asked > 0 {
            moves.extend([Move::Answer(1), Move::Answer(2)]);
        }
        if !self.encoding.is_empty() {
            moves.push(Move::Encoded);
        }
        for (&hand, device) in &self.devices {
            if !device.joined {
                moves.push(Move::Join(hand));
            }
            if !device.inbox.is_empty() {
                moves.push(Move::ToHand(hand));
            }
            if !device.outbox.is_empty() {
                moves.push(Move::ToCrew(hand));
                if self.repeats > 0 {
                    moves.push(Move::Repeat(hand));
                }
            }
            if self.crashes > 0 {
                moves.push(Move::Crash(hand));
            }
        }
        if self.stalls > 0 {
            moves.push(Move::Stall);
        }
        if self.hedges > 0 && self.crew.phase == Phase::Decoding {
            for (&hand, member) in &self.crew.members {
                let others = (0..self.shape.plan.tiles.len() as u32).filter(|tile| !member.tiles.contains(tile));
                moves.extend(others.map(|tile| Move::Hedge(tile, hand)));
            }
        }
        moves
    }

    fn make(&mut self, next: Move) {
        self.history.push(format!("{next:?}"));
        match next {
            Move::Answer(hands) => {
                self.asked -= 1;
                for _ in 0..hands {
                    let hand = Hand::new(self.shape.norms.len() as u32, self.shape.chunks());
                    let (inbox, outbox) = (VecDeque::new(), VecDeque::new());
                    self.devices
                        .insert(self.next_hand, Device { hand, inbox, outbox, joined: false, dismissed: false });
                    self.next_hand += 1;
                }
                self.tell(Event::Expect { hands });
            }
            Move::Join(hand) => {
                self.devices.get_mut(&hand).unwrap().joined = true;
                self.tell(Event::Joined(hand));
            }
            Move::ToHand(hand) => {
                let device = self.devices.get_mut(&hand).unwrap();
                let message = device.inbox.pop_front().unwrap();
                device.hand.hear(message).unwrap();
                if device.run(&self.shape) {
                    self.devices.remove(&hand);
                }
            }
            Move::ToCrew(hand) | Move::Repeat(hand) => {
                let device = self.devices.get_mut(&hand).unwrap();
                let message = match next {
                    Move::Repeat(_) => device.outbox.front().cloned().unwrap(),
                    _ => device.outbox.pop_front().unwrap(),
                };
                self.repeats -= u32::from(matches!(next, Move::Repeat(_)));
                self.tell(Event::Message(hand, message));
            }
            Move::Encoded => {
                let chunk = self.encoding.pop_front().unwrap();
                self.tell(Event::Encoded { chunk });
            }
            Move::Crash(hand) => {
                self.crashes -= 1;
                let joined = self.devices.remove(&hand).unwrap().joined;
                if joined {
                    self.tell(Event::Left { hand, reason: "crashed".into() });
                } else {
                    self.wait_out(Duration::from_secs(3));
                }
            }
            Move::Stall => {
                self.stalls -= 1;
                self.wait_out(Duration::from_secs(3600));
            }
            Move::Hedge(tile, hand) => {
                self.hedges -= 1;
                let mut out = Vec::new();
                self.crew.hedge(tile, hand, &mut out);
                self.follow(out);
            }
        }
    }

    /// A tick so much later. All times go back to where they were, so that worlds can be compared.
    fn wait_out(&mut self, span: Duration) {
        let now = self.now;
        self.now += span;
        self.tell(Event::Tick);
        self.now = now;
        self.crew.opened = now;
        self.crew.latest = now;
        self.crew.longest = Duration::ZERO;
        self.crew.catching_up = Duration::ZERO;
        if let Phase::Gathering { until, .. } = &mut self.crew.phase {
            *until = now + self.crew.patience.join;
        }
    }

    /// What tells two worlds apart.
    fn key(&self) -> String {
        let mut world = self.clone();
        world.crew.counters = Counters::default();
        world.history.clear();
        world.crew.shape = shape(1, 0, &[]);
        world.shape = world.crew.shape.clone();
        format!("{world:?}")
    }
}

impl Device {
    /// Works until it has to wait. True if it is done.
    fn run(&mut self, shape: &Shape) -> bool {
        loop {
            match self.hand.todo() {
                Todo::Wait => return false,
                Todo::Done => return true,
                Todo::Take { .. } | Todo::Begin { .. } | Todo::Advance { .. } | Todo::Drop { .. } => {}
                Todo::Give { number, step } => {
                    let sums = sums(shape, number, step);
                    self.outbox.push_back(FromHand::Given { number, step, busy_ms: 0, sums, edges: None });
                }
                Todo::Frames { number, chunk } => {
                    let pixels = pixels(shape, number, chunk);
                    self.outbox.push_back(FromHand::Frames { number, chunk, pixels });
                }
            }
        }
    }
}

/// Tries all orders in which things can happen. Returns how many worlds there are.
fn explore(start: World) -> usize {
    let mut seen = HashSet::from([start.key()]);
    let mut open = vec![start];
    while let Some(world) = open.pop() {
        if world.ended.is_some() {
            assert_eq!(world.ended, Some(Ok(())), "with hands enough it succeeds: {:?}", world.history);
            assert_eq!(world.emitted, world.shape.chunks());
            continue;
        }
        let moves = world.moves();
        assert!(moves.iter().any(Move::is_progress), "nothing can happen any more: {world:#?}");
        for next in moves {
            let mut world = world.clone();
            world.make(next);
            if seen.insert(world.key()) {
                open.push(world);
            }
        }
    }
    seen.len()
}

#[test]
fn two_tiles_end_well_in_every_order_of_events_with_two_crashes() {
    let world = World { crashes: 2, ..World::new(shape(2, 1, &[0, 0]), Instant::now()) };
    let worlds = explore(world);
    assert!(worlds > 1000, "{worlds}");
}

#[test]
fn two_tiles_end_well_in_every_order_of_events_with_messages_repeated_and_lost_patience() {
    let world = World { repeats: 1, stalls: 1, ..World::new(shape(2, 2, &[0]), Instant::now()) };
    let worlds = explore(world);
    assert!(worlds > 500, "{worlds}");
}

#[test]
fn a_tile_that_two_hands_decode_ends_well_in_every_order_of_events() {
    let world = World { crashes: 1, hedges: 1, ..World::new(shape(2, 1, &[0, 0]), Instant::now()) };
    let worlds = explore(world);
    assert!(worlds > 500, "{worlds}");
}

#[test]
fn modes_without_exchange_end_well_in_every_order_of_events() {
    let world = World { crashes: 1, hedges: 1, ..World::new(shape(2, 0, &[0, 0, 0]), Instant::now()) };
    let worlds = explore(world);
    assert!(worlds > 500, "{worlds}");
}

/// A crew of so many hands that is decoding, with a tile for each at least.
fn decoding(hands: usize, tiles: usize) -> World {
    let mut world = World::new(shape(tiles, 2, &[1, 6]), Instant::now());
    world.make(Move::Answer(hands));
    (0..hands as u32).for_each(|hand| world.make(Move::Join(hand)));
    world
}

/// The assignments that are on their way to a hand.
fn assigned(world: &World, hand: HandId) -> Vec<u32> {
    let number = |message: &ToHand| match message {
        ToHand::Assign { number, .. } => Some(*number),
        _ => None,
    };
    world.devices[&hand].inbox.iter().filter_map(number).collect()
}

#[test]
fn tiles_are_dealt_evenly_and_neighbours_to_the_same_hand() {
    let world = decoding(3, 7);
    assert_eq!([0, 1, 2].map(|hand| assigned(&world, hand)), [vec![0, 1, 2], vec![3, 4], vec![5, 6]]);
    let world = decoding(3, 2);
    assert!(assigned(&world, 2).is_empty(), "a hand without a tile is let go");
    assert!(world.devices[&2].dismissed && !world.devices[&0].dismissed);
}

#[test]
fn hands_that_do_not_come_are_not_waited_for() {
    let mut world = World::new(shape(4, 2, &[1]), Instant::now());
    world.make(Move::Answer(3));
    world.make(Move::Join(1));
    assert!(assigned(&world, 1).is_empty());
    world.now += Patience::default().join;
    world.tell(Event::Tick);
    assert_eq!(assigned(&world, 1), [0, 1, 2, 3]);
    world.make(Move::Join(0));
    assert!(world.devices[&0].dismissed, "too late: its device is of use elsewhere");
}

#[test]
fn without_any_hand_it_is_given_up_after_some_rounds() {
    let mut world = World::new(shape(2, 2, &[1]), Instant::now());
    for round in 1..=4 {
        assert_eq!((world.asked, world.ended.clone()), (1, None), "round {round}");
        world.asked = 0;
        world.tell(Event::Expect { hands: 0 });
    }
    assert!(world.ended.unwrap().unwrap_err().contains("4 rounds"));
}

#[test]
fn what_a_hand_cannot_have_ends_its_connection_and_its_tiles_go_to_others() {
    let sums = || Sums { count: 4, moments: vec![[0.0, 0.0]] };
    let given = |number, step, sums| FromHand::Given { number, step, busy_ms: 0, sums, edges: None };
    let frames = |number, chunk| FromHand::Frames { number, chunk, pixels: Pixels::Rgb16(vec![0; 768]) };
    let bad = [
        (given(9, 0, sums()), "no tile 9"),
        (given(0, 1, sums()), "step 0 is not closed"),
        (given(0, 0, Sums { count: 5, ..sums() }), "sums of 4 values"),
        (given(0, 0, Sums { count: 4, moments: vec![] }), "1 sums"),
        (given(0, 0, Sums { count: 4, moments: vec![[f64::NAN, 0.0]] }), "not finite"),
        (FromHand::Given { number: 0, step: 0, busy_ms: 0, sums: sums(), edges: Some(Edges::default()) }, "edges"),
        (frames(0, 0), "before its steps were closed"),
        (frames(0, 7), "no chunk 7"),
        (FromHand::Failed { message: "out of memory".into() }, "out of memory"),
    ];
    for (message, reason) in bad {
        let mut world = decoding(2, 2);
        let actions = world.crew.on(Event::Message(0, message), world.now);
        let told = actions.iter().find_map(|action| match action {
            Action::Dismiss { hand: 0, reason: Some(reason) } => Some(reason.clone()),
            _ => None,
        });
        assert!(told.as_ref().is_some_and(|told| told.contains(reason)), "{reason}: {told:?}");
        let heir = actions.iter().any(|action| matches!(action, Action::Send(1, ToHand::Assign { number: 0, .. })));
        assert!(heir && world.crew.counters().refused == 1, "{reason}");
    }
}

#[test]
fn pixels_of_another_number_are_refused() {
    let mut world = decoding(2, 2);
    while world.crew.log.len() < 2 {
        let next = world.moves().into_iter().find(|next| matches!(next, Move::ToHand(_) | Move::ToCrew(_))).unwrap();
        world.make(next);
    }
    let pixels = Pixels::Rgb16(vec![0; 767]);
    let actions = world.crew.on(Event::Message(0, FromHand::Frames { number: 0, chunk: 0, pixels }), world.now);
    assert!(format!("{actions:?}").contains("768 values in chunk 0, not 767"), "{actions:?}");
}

#[test]
fn a_hand_at_half_the_pace_gets_a_second_beside_it() {
    let mut world = decoding(2, 2);
    let patience = Duration::from_secs(600);
    world.crew.patience.stall = patience;
    for step in 0..2 {
        for (hand, busy_ms) in [(0, 4000 * (u64::from(step) + 1)), (1, 100)] {
            let sums = sums(&world.shape, hand, step);
            world.tell(Event::Message(hand, FromHand::Given { number: hand, step, busy_ms, sums, edges: None }));
        }
    }
    assert_eq!((assigned(&world, 0), assigned(&world, 1)), (vec![0], vec![1, 0]));
    assert_eq!(world.crew.on(Event::Tick, world.now), [], "one second hand is enough");
}

#[test]
fn a_silent_hand_is_not_waited_for_longer_than_another_needs_for_its_tile() {
    let mut world = decoding(2, 2);
    let pass = |world: &mut World, span| {
        world.now += span;
        world.tell(Event::Tick);
        assigned(world, 1).len()
    };
    assert_eq!(pass(&mut world, 3 * HEDGE_AFTER), 1, "nobody has done this step yet");
    let given = FromHand::Given { number: 1, step: 0, busy_ms: 5, sums: sums(&world.shape, 1, 0), edges: None };
    world.tell(Event::Message(1, given));
    assert_eq!(pass(&mut world, 2 * HEDGE_AFTER), 1, "it has taken the other longer than that");
    assert_eq!(pass(&mut world, HEDGE_AFTER), 2, "nothing is done yet: starting over costs nothing");
    assert_eq!((pass(&mut world, 9 * HEDGE_AFTER), world.crew.counters().hedges), (2, 1), "one second hand is enough");
}

#[test]
fn exact_tiles_end_with_a_lost_hand() {
    let mut world = World::new(
        Arc::new(Shape::new(plan("exact:2x2", [2, 4]), vec![1], shape(2, 2, &[1]).norms.clone())),
        Instant::now(),
    );
    world.make(Move::Answer(2));
    (0..2).for_each(|hand| world.make(Move::Join(hand)));
    world.tell(Event::Left { hand: 0, reason: "gone".into() });
    assert!(world.ended.unwrap().unwrap_err().contains("exact tiles cannot be taken over"));
}

proptest! {
    #[test]
    fn larger_crews_end_well_in_random_orders(
        tiles in 1..6usize, norms in 0..4usize, chunks in 1..5usize, picks in prop::collection::vec(any::<prop::sample::Index>(), 0..400)
    ) {
        let frames: Vec<u32> = (0..chunks).map(|chunk| if chunk == 0 { 1 } else { 6 }).collect();
        let shape = shape(tiles, norms, &frames);
        let mut world = World { crashes: 3, repeats: 3, stalls: 0, hedges: 2, ..World::new(shape, Instant::now()) };
        world.crew.rounds_left = 9;
        world.crew.patience.rounds = 9;
        let mut picks = picks.into_iter();
        while world.ended.is_none() {
            let moves = world.moves();
            prop_assert!(!moves.is_empty());
            let next = match picks.next() {
                Some(pick) => moves[pick.index(moves.len())],
                // Then whatever brings it on.
                None => *moves.iter().find(|next| next.is_progress()).unwrap(),
            };
            world.make(next);
        }
        prop_assert_eq!(world.ended, Some(Ok(())));
    }
}
