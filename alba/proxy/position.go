package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"scoria/alba"
	"scoria/alba/asd"
)

// ErrOlder: a storage daemon was told of changes of the registry that it does not have:
// it was put back from an older backup, and must be rebuilt from the storage daemons.
var ErrOlder = errors.New("the registry is older than what the storage daemon was told")

// tellEvery is the least time between two times that devices are told the position.
const tellEvery = time.Second

// position is what this proxy knows of how far the registry is. See package alba.
type position struct {
	mu       sync.Mutex
	history  alba.History
	revision int64                    // largest that was seen
	worth    int64                    // largest of a change that devices are told of
	later    map[string]alba.Position // devices with what they were told that the registry does not know

	news chan struct{} // a token when worth has grown
}

// beginGeneration starts a generation of the registry.
func (p *Proxy) beginGeneration(ctx context.Context) error {
	for range tries {
		kv, _, err := p.reg.Get(ctx, alba.HistoryKey)
		if err != nil {
			return err
		}
		h, err := alba.DecodeHistory(kv)
		if err != nil {
			return err
		}
		h.Begin(h.NextGeneration(time.Now()))
		value := alba.Encode(h)
		rev, err := p.reg.Commit(ctx, []alba.Compare{{Key: alba.HistoryKey, Revision: kv.Revision}}, []alba.Write{{Key: alba.HistoryKey, Value: value}})
		if err == nil {
			return p.learn(alba.KV{Key: alba.HistoryKey, Value: value, Revision: rev}, true)
		}
		if !errors.Is(err, alba.ErrConflict) {
			return err
		}
	}
	return ErrBusy
}

// learn takes in the history as the registry has it.
func (p *Proxy) learn(kv alba.KV, worth bool) error {
	h, err := alba.DecodeHistory(kv)
	if err != nil {
		return err
	}
	p.at.mu.Lock()
	p.at.history = h
	p.at.mu.Unlock()
	p.saw(kv.Revision, worth)
	return nil
}

// saw notes that the registry is at a revision at least; worth: devices are to know.
func (p *Proxy) saw(revision int64, worth bool) {
	p.at.mu.Lock()
	p.at.revision = max(p.at.revision, revision)
	if worth && revision > p.at.worth {
		p.at.worth = revision
	} else {
		worth = false
	}
	p.at.mu.Unlock()
	if worth {
		select {
		case p.at.news <- struct{}{}:
		default:
		}
	}
}

// reread reads the history anew, and finds out how far the registry is: another daemon
// may have told a device.
func (p *Proxy) reread(ctx context.Context) error {
	kv, _, err := p.reg.Get(ctx, alba.HistoryKey)
	if err != nil {
		return err
	}
	if err := p.learn(kv, false); err != nil {
		return err
	}
	rev, err := p.reg.Commit(ctx, nil, nil)
	if err == nil {
		p.saw(rev, true)
	}
	return err
}

// knows says whether the registry has all that a device was told.
func (p *Proxy) knows(device string, told alba.Position) bool {
	p.at.mu.Lock()
	defer p.at.mu.Unlock()
	return p.at.history.Knows(device, told, p.at.revision)
}

// ToldPosition returns what a device was told last, 0 if nothing.
func ToldPosition(ctx context.Context, c asd.Client) (alba.Position, error) {
	// The name before it: there are at most a few behind.
	list, _, err := c.Epochs(ctx, alba.PositionName[:len(alba.PositionName)-1])
	for _, e := range list {
		if e.Namespace == alba.PositionName {
			return alba.Position(e.Epoch), err
		}
	}
	return 0, err
}

// checkPosition fails with ErrOlder if the registry lacks what a device was told.
func (p *Proxy) checkPosition(ctx context.Context, id string, c asd.Client) error {
	told, err := ToldPosition(ctx, c)
	if err != nil || p.knows(id, told) {
		return err
	}
	p.at.mu.Lock()
	looked := p.at.later[id] == told
	p.at.mu.Unlock()
	if !looked {
		if err := p.reread(ctx); err != nil {
			return err
		}
		if p.knows(id, told) {
			return nil
		}
		p.at.mu.Lock()
		if p.at.later == nil {
			p.at.later = map[string]alba.Position{}
		}
		p.at.later[id] = told
		p.at.mu.Unlock()
	}
	return fmt.Errorf("device %s was told of change %v: %w", id, told, ErrOlder)
}

// positionOf returns the position of a change that this proxy has seen, as devices may be
// told it. The history is read after the change was seen: a generation that began since
// begins behind it, so that what is told is never behind the end of the one that it is
// told of.
func (p *Proxy) positionOf(ctx context.Context, revision int64) (alba.Position, error) {
	kv, _, err := p.reg.Get(ctx, alba.HistoryKey)
	if err != nil {
		return 0, err
	}
	if err := p.learn(kv, false); err != nil {
		return 0, err
	}
	pos, ok := p.at.position(revision)
	if !ok {
		if err := p.beginGeneration(ctx); err != nil {
			return 0, err
		}
		pos, ok = p.at.position(revision)
	}
	if !ok {
		return 0, fmt.Errorf("how far the registry is can't be said now: %w", ErrBusy)
	}
	return pos, nil
}

// now returns how far the registry is.
func (p *Proxy) now(ctx context.Context) (alba.Position, error) {
	revision, err := p.reg.Commit(ctx, nil, nil)
	if err != nil {
		return 0, err
	}
	p.saw(revision, false)
	return p.positionOf(ctx, revision)
}

// mark returns the position of a change, for devices that delete what it made
// superfluous: they know it durably when that is gone, so that a registry of before does
// not go on without it. 0 if devices are told nothing.
func (p *Proxy) mark(ctx context.Context, revision int64) (alba.Position, error) {
	if p.opts.Silent {
		return 0, nil
	}
	return p.positionOf(ctx, revision)
}

// position returns that of a revision by the history that this proxy knows; ok is false if
// the generation is too long.
func (a *position) position(revision int64) (pos alba.Position, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.history.At(revision)
}

// tell tells devices of changes as they come, at most once per tellEvery. It ends with
// the proxy; Close tells them of the last ones.
func (p *Proxy) tell() {
	for {
		select {
		case <-p.at.news:
		case <-p.ctx.Done():
			return
		}
		p.tellNow(p.ctx)
		select {
		case <-time.After(tellEvery):
		case <-p.ctx.Done():
			return
		}
	}
}

// tellNow tells all devices that are up, and don't know it yet, how far the registry is.
// One that can't be told is told when it is back.
func (p *Proxy) tellNow(ctx context.Context) {
	p.at.mu.Lock()
	worth := p.at.worth
	p.at.mu.Unlock()
	if pos, ok := p.at.position(worth); ok && !p.anyBefore(pos) {
		return
	}
	pos, err := p.positionOf(ctx, worth)
	if err != nil {
		if ctx.Err() == nil {
			p.opts.Log.Warn().Err(err).Msg("storage daemons can't be told how far the registry is")
		}
		return
	}
	var g errgroup.Group
	for _, m := range p.fleet.Members() {
		if m.behind(pos) {
			g.Go(func() error { m.tell(ctx, pos); return nil })
		}
	}
	_ = g.Wait()
}

// tellLast tells of what came last, at the end, whether it was seen yet or not.
func (p *Proxy) tellLast() {
	ctx, cancel := context.WithTimeout(context.Background(), statTimeout)
	defer cancel()
	if err := p.reread(ctx); err == nil {
		p.tellNow(ctx)
	}
}

// anyBefore says whether a device is to be told of a position.
func (p *Proxy) anyBefore(pos alba.Position) bool {
	return slices.ContainsFunc(p.fleet.Members(), func(m *Member) bool { return m.behind(pos) })
}

// behind says whether the device can be told of a position and was not.
func (m *Member) behind(pos alba.Position) bool {
	if !m.Up() {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.told < pos && m.rec.State != alba.DeviceRemoved
}

// tell tells the device a position, unless it knows a later one.
func (m *Member) tell(ctx context.Context, pos alba.Position) {
	ctx, cancel := context.WithTimeout(ctx, statTimeout)
	defer cancel()
	// Also where it fails as the device knows a later one.
	err := m.Apply(ctx, nil, []asd.Update{asd.RaiseEpoch(alba.PositionName, uint64(pos))}, asd.PriorityGuest)
	if err == nil || errors.Is(err, asd.ErrStaleEpoch) {
		m.mu.Lock()
		m.told = max(m.told, pos)
		m.mu.Unlock()
	}
}

// worthTelling says whether devices are to know of a change of the registry: only those
// matter that say what is on them.
func worthTelling(key string) bool {
	return !strings.HasPrefix(key, alba.JobPrefix)
}

// checkRegistry lets nobody have a client of a device that knows more than the registry.
func (m *Member) checkRegistry(ctx context.Context, c asd.Client) error {
	m.mu.Lock()
	checked, id := m.checked || m.fleet.check == nil, m.rec.ID
	m.mu.Unlock()
	if checked {
		return nil
	}
	err := m.fleet.check(ctx, id, c)
	if errors.Is(err, asd.ErrCorrupt) {
		// It is to be emptied, which its other values need; what is deleted asserts the
		// position, and so is not.
		return nil
	}
	if err != nil && !errors.Is(err, ErrOlder) {
		return m.note(ctx, 0, err)
	}
	m.mu.Lock()
	m.checked, m.older = err == nil, err
	m.mu.Unlock()
	if err != nil {
		m.failed(time.Now(), err)
	}
	return err
}

// ApplyKnowing is Apply of deletions that follow from what the registry lacks: it fails if
// the device was told of a change that the registry does not have.
func (m *Member) ApplyKnowing(ctx context.Context, asserts []asd.Assert, updates []asd.Update) error {
	err := m.applyKnowing(ctx, asserts, updates)
	if staleName(err) != alba.PositionName {
		return err
	}
	// Another daemon was quicker, or it is another registry's now.
	m.mu.Lock()
	m.checked = false
	m.mu.Unlock()
	if err := m.fleet.refresh(ctx); err != nil {
		return err
	}
	return m.applyKnowing(ctx, asserts, updates)
}

func (m *Member) applyKnowing(ctx context.Context, asserts []asd.Assert, updates []asd.Update) error {
	if m.fleet.now == nil {
		return m.Apply(ctx, asserts, updates, asd.PriorityRepair)
	}
	pos, err := m.fleet.now(ctx)
	if err != nil {
		return err
	}
	if m.fleet.silent {
		asserts = append(asserts[:len(asserts):len(asserts)], asd.AssertEpoch(alba.PositionName, uint64(pos)))
	} else { // fails where the assert would
		updates = append(updates[:len(updates):len(updates)], asd.RaiseEpoch(alba.PositionName, uint64(pos)))
	}
	return m.Apply(ctx, asserts, updates, asd.PriorityRepair)
}

// applyMarked is Apply of deletions: the device knows a position of the registry before they
// are done, or with them.
func (m *Member) applyMarked(ctx context.Context, mark alba.Position, asserts []asd.Assert, updates []asd.Update) error {
	m.mu.Lock()
	known := m.told >= mark
	m.mu.Unlock()
	if known {
		return m.Apply(ctx, asserts, updates, asd.PriorityRepair)
	}
	marked := append(updates[:len(updates):len(updates)], asd.RaiseEpoch(alba.PositionName, uint64(mark)))
	err := m.Apply(ctx, asserts, marked, asd.PriorityRepair)
	later := staleName(err) == alba.PositionName
	if err == nil || later {
		m.mu.Lock()
		m.told = max(m.told, mark)
		m.mu.Unlock()
	}
	if later {
		return m.Apply(ctx, asserts, updates, asd.PriorityRepair)
	}
	return err
}

// Older returns ErrOlder with a device that knows more than the registry, if there is
// one in use.
func (p *Proxy) Older() error {
	for _, m := range p.fleet.Members() {
		if err := m.Older(); err != nil {
			return err
		}
	}
	return nil
}

// Older returns ErrOlder if the device is in use and knows more than the registry.
func (m *Member) Older() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rec.State == alba.DeviceRemoved {
		return nil
	}
	return m.older
}

// Refuse has every call for objects fail with err from now on.
func (p *Proxy) Refuse(err error) { p.refused.Store(&err) }
