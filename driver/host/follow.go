package host

import (
	"context"
	"errors"
	"slices"
	"time"

	"scoria/driver/registry"
)

// recordAtStop bounds the last record of what is attached.
const recordAtStop = 3 * time.Second

// startFollowing opens, in the background, the volumes that guests will want at
// once, lets front ends have them then, and records which volumes are attached.
func (h *Host) startFollowing(ctx context.Context) {
	before := h.attachedBefore(ctx)
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	h.undoLater(func() error {
		cancel()
		h.bg.Wait()
		return nil
	})
	unfinished, err := h.volumes.unfinished(ctx)
	if err != nil {
		h.log.Warn().Err(err).Msg("unfinished work on snapshots can't be listed; it is finished when the volumes are opened")
	}
	names := union(union(h.pendingNames(ctx), before), unfinished)
	h.volumes.await(names)
	h.bg.Go(func() {
		began := time.Now()
		h.volumes.openAwaited(ctx, names, func() {
			if len(names) > 0 {
				h.log.Info().Int("volumes", len(names)).Dur("took", time.Since(began)).Msg("volumes that were attached before are open")
			}
		})
	})
	h.bg.Go(func() { h.follow(ctx, before) })
}

func (h *Host) attachedBefore(ctx context.Context) []string {
	e, err := registry.Load[registry.Node](ctx, h.reg, registry.NodeKey(h.id.ID))
	if err != nil {
		h.log.Warn().Err(err).Msg("which volumes were attached is not known; they open when they are asked for")
	}
	return e.Record.Attached
}

// pendingNames are the volumes with data in the write buffer: until they are
// open, that memory is taken.
func (h *Host) pendingNames(ctx context.Context) []string {
	pending := h.engine.Pending()
	if len(pending) == 0 {
		return nil
	}
	entries, err := registry.LoadAll[registry.Volume](ctx, h.reg, registry.VolumePrefix)
	if err != nil {
		h.log.Warn().Err(err).Msg("volumes can't be listed")
	}
	var names []string
	for i := range entries {
		if slices.Contains(pending, entries[i].Record.ID) {
			names = append(names, entries[i].Record.FullName())
		}
	}
	return names
}

// follow records the attached volumes when they change, at most once a second.
// For a while after the start those of the last run stay on the list: their
// guests are on the way back.
func (h *Host) follow(ctx context.Context, before []string) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	recorded := before
	for {
		select {
		case <-ctx.Done():
			// It is for the next start's speed; a registry that hangs must not keep the
			// daemon from ending.
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordAtStop)
			h.record(last, h.attachedNow(before), recorded)
			cancel()
			return
		case <-tick.C:
			now := h.attachedNow(before)
			if h.record(ctx, now, recorded) {
				recorded = now
			}
		}
	}
}

func (h *Host) attachedNow(before []string) []string {
	now := h.volumes.attached()
	if time.Since(h.started) < attachmentsGrace {
		now = union(now, before)
	}
	return now
}

// union is sorted.
func union(a, b []string) []string {
	return slices.Compact(slices.Sorted(slices.Values(slices.Concat(a, b))))
}

func (h *Host) record(ctx context.Context, now, recorded []string) bool {
	if slices.Equal(now, recorded) {
		return true
	}
	_, err := registry.Update(ctx, h.reg, registry.NodeKey(h.id.ID), func(n *registry.Node) error {
		n.Attached = now
		return nil
	})
	if err != nil && !errors.Is(err, context.Canceled) {
		h.log.Warn().Err(err).Msg("attached volumes are not recorded; the next start opens them when they are asked for")
	}
	return err == nil
}
