//! Which place has been without live sockets for longest. A list linked through indices, so that each step takes
//! the same short time however many places there are: who renames processes must not be able to slow us down.

/// Places by when they lost their last live socket.
#[derive(Debug)]
pub struct IdleList {
    links: Vec<Link>,
    first: usize,
    last: usize,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    since_ns: u64,
    before: usize,
    after: usize,
}

const END: usize = usize::MAX;

impl IdleList {
    pub fn new() -> Self {
        Self {
            links: Vec::new(),
            first: END,
            last: END,
        }
    }

    /// The place that has been idle for longest, and since when.
    pub fn longest(&self) -> Option<(usize, u64)> {
        let link = self.links.get(self.first)?;
        Some((self.first, link.since_ns))
    }

    /// `place` is not in the list, and `since_ns` not before that of any that is, but for the few microseconds
    /// by which events of different CPUs may come in the wrong order.
    pub fn push(&mut self, place: usize, since_ns: u64) {
        let link = Link {
            since_ns,
            before: self.last,
            after: END,
        };
        if place >= self.links.len() {
            self.links.resize(place + 1, link);
        }
        self.links[place] = link;
        match self.links.get_mut(self.last) {
            Some(last) => last.after = place,
            None => self.first = place,
        }
        self.last = place;
    }

    /// `place` is in the list.
    pub fn remove(&mut self, place: usize) {
        let Link { before, after, .. } = self.links[place];
        match self.links.get_mut(before) {
            Some(link) => link.after = after,
            None => self.first = after,
        }
        match self.links.get_mut(after) {
            Some(link) => link.before = before,
            None => self.last = before,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::IdleList;

    fn drain(list: &mut IdleList) -> Vec<(usize, u64)> {
        std::iter::from_fn(|| {
            let longest = list.longest()?;
            list.remove(longest.0);
            Some(longest)
        })
        .collect()
    }

    #[test]
    fn places_come_out_in_the_order_in_which_they_became_idle() {
        let mut list = IdleList::new();
        assert_eq!(list.longest(), None);
        for (place, since_ns) in [(3, 10), (0, 20), (7, 30), (1, 40)] {
            list.push(place, since_ns);
        }
        list.remove(0);
        list.remove(3);
        list.push(3, 50);
        assert_eq!(drain(&mut list), [(7, 30), (1, 40), (3, 50)]);
        list.push(1, 60);
        list.push(0, 70);
        list.remove(0);
        assert_eq!(drain(&mut list), [(1, 60)]);
        assert_eq!(drain(&mut list), []);
    }
}
