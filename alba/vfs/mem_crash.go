package vfs

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
)

// CrashClone returns what a loss of power at this moment could leave: what was
// synced; of the rest any subset, decided by rng and torn at sectors; no mapped
// file and no lock. m goes on as if nothing had happened, so one moment can be
// tried with many seeds. The hook is not inherited, the capacity is. It panics if m
// was killed: then nothing is left of what it held.
func (m *Mem) CrashClone(rng *rand.Rand) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.killed {
		panic("vfs: CrashClone of an instance that was killed")
	}
	out := m.successor(rng)
	lossPercent := [...]int{0, 50, 100}[rng.IntN(3)]
	kept := make(map[*nameTx]bool)
	seen := make(map[*node]*node)
	var crash func(n *node) *node
	crash = func(n *node) *node {
		if c := seen[n]; c != nil {
			return c
		}
		var c *node
		if n.dir == nil {
			c = newFile()
			c.durable = n.durable.clone()
			c.durable.survive(n.journal, rng)
			c.cur = c.durable.clone()
			seen[n] = c
			return c
		}
		c = newDirectory()
		seen[n] = c
		names := n.dir.survive(func(tx *nameTx) bool {
			keep, decided := kept[tx]
			if !decided {
				keep = rng.IntN(100) >= lossPercent
				kept[tx] = keep
			}
			return keep
		})
		for _, name := range sortedKeys(names) {
			if names[name].memory == nil {
				c.dir.cur[name] = crash(names[name])
			}
		}
		c.dir.durable = maps.Clone(c.dir.cur)
		return c
	}
	out.root = crash(m.root)
	out.recount()
	return out
}

// survive returns the names that a loss of power leaves.
func (d *directory) survive(kept func(*nameTx) bool) map[string]*node {
	names := maps.Clone(d.durable)
	for _, ch := range d.journal {
		switch {
		case !kept(ch.tx):
		case ch.node == nil:
			delete(names, ch.name)
		default:
			names[ch.name] = ch.node
		}
	}
	return names
}

// KillClone returns what the next process finds after this one was killed: every
// file and name as written (what is synced and what is not stays so) and every
// mapping's bytes as stored, but no open file, no lock and no hook.
//
// m is cut off: its calls return ErrKilled (Close works), and stores into its
// mappings no longer reach the clone. The cut is consistent even while other
// goroutines store: if the clone has a store then it has every store that
// happened before it.
func (m *Mem) KillClone() (*Mem, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.killed {
		return nil, fmt.Errorf("clone: %w", ErrKilled)
	}
	m.killed = true
	out := m.successor(m.rng)
	k := killer{nodes: make(map[*node]*node), dirs: make(map[*directory]*directory), txs: make(map[*nameTx]*nameTx)}
	out.root = k.clone(m.root)
	for tx, c := range k.txs {
		c.to = k.dirs[tx.to]
	}
	// All areas are cut before any is copied, or a store into the second could
	// be seen without an earlier one into the first.
	for n := range k.nodes {
		if n.memory != nil {
			if err := n.memory.cut(); err != nil {
				return nil, fmt.Errorf("clone: %w", err)
			}
		}
	}
	for n, c := range k.nodes {
		if n.memory != nil {
			var err error
			if c.memory, err = n.memory.copy(); err != nil {
				return nil, fmt.Errorf("clone: %w", err)
			}
		}
	}
	out.recount()
	m.forget()
	return out, nil
}

// Kill cuts m off as KillClone does, without a clone: for what should no longer
// reach anything after CrashClone. Stores into mappings still land, unseen.
func (m *Mem) Kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.killed = true
	m.forget()
}

// forget drops all contents of a killed instance, which no call reaches any more.
// Goroutines of the process that was killed, a key-value store's for one, may hold
// on to m and its files for as long as the tests run.
func (m *Mem) forget() {
	seen := make(map[*node]bool)
	var visit func(n *node)
	visit = func(n *node) {
		if n == nil || seen[n] {
			return
		}
		seen[n] = true
		if n.dir == nil {
			n.cur, n.durable = newContent(), newContent()
			n.dirty = make(map[int64]struct{})
			n.journal, n.journalBytes = nil, 0
			return
		}
		for _, names := range []map[string]*node{n.dir.cur, n.dir.durable} {
			for _, child := range names {
				visit(child)
			}
		}
		for _, ch := range n.dir.journal {
			visit(ch.node)
		}
	}
	visit(m.root)
	m.root, m.used = newDirectory(), 0
}

// killer copies the graph of nodes; names of one file stay names of one file.
type killer struct {
	nodes map[*node]*node
	dirs  map[*directory]*directory
	txs   map[*nameTx]*nameTx
}

func (k *killer) clone(n *node) *node {
	if n == nil {
		return nil
	}
	if c := k.nodes[n]; c != nil {
		return c
	}
	c := new(node)
	k.nodes[n] = c
	if n.dir != nil {
		c.dir = new(directory)
		k.dirs[n.dir] = c.dir
		c.dir.cur = k.names(n.dir.cur)
		c.dir.durable = k.names(n.dir.durable)
		c.dir.journal = make([]nameChange, len(n.dir.journal))
		for i, ch := range n.dir.journal {
			c.dir.journal[i] = nameChange{ch.name, k.clone(ch.node), k.tx(ch.tx)}
		}
		return c
	}
	c.cur, c.durable = n.cur.clone(), n.durable.clone()
	c.dirty = maps.Clone(n.dirty)
	c.journal = slices.Clone(n.journal)
	c.journalBytes, c.diverged = n.journalBytes, n.diverged
	return c
}

func (k *killer) names(names map[string]*node) map[string]*node {
	out := make(map[string]*node, len(names))
	for name, n := range names {
		out[name] = k.clone(n)
	}
	return out
}

func (k *killer) tx(tx *nameTx) *nameTx {
	c := k.txs[tx]
	if c == nil {
		c = new(nameTx)
		k.txs[tx] = c
	}
	return c
}

// successor returns an empty Mem with m's limits and a random source of its own.
func (m *Mem) successor(rng *rand.Rand) *Mem {
	return &Mem{capacity: m.capacity, rng: rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))}
}

// recount derives links and used from the tree, once nothing is open.
func (m *Mem) recount() {
	var visit func(n *node)
	visit = func(n *node) {
		for _, child := range n.dir.cur {
			child.links++
			switch {
			case child.dir != nil:
				visit(child)
			case child.links == 1:
				m.used += int64(len(child.cur.pages)) * pageSize
			}
		}
	}
	visit(m.root)
}
