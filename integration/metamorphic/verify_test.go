package metamorphic

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"scoria/alba"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// readBytes is how much is read at once.
const readBytes = 1 << 20

// contents reads a volume or snapshot.
func (r *run) contents(name string) ([]version, error) {
	var list []version
	err := r.device(name, func(_ context.Context, dev block.Device) error {
		size := dev.Info().Size
		p := make([]byte, readBytes)
		for off := uint64(0); off < size; off += readBytes {
			p = p[:min(readBytes, size-off)]
			if err := submit(dev, &block.Request{Op: block.OpRead, Offset: off, Length: uint64(len(p)), Segments: [][]byte{p}}); err != nil {
				return err
			}
			part, err := readStamps(p, off/sector)
			if err != nil {
				return err
			}
			list = append(list, part...)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return list, nil
}

// observe finds out all that there is.
func (r *run) observe() ([]*observed, error) {
	var list []control.Volume
	err := r.ask("list", func(ctx context.Context, c *control.Client) (err error) {
		list, err = c.Volumes(ctx, "")
		return err
	})
	if err != nil {
		return nil, err
	}
	var found []*observed
	for _, v := range list {
		o := &observed{name: v.Name, template: v.Template, readOnly: v.ReadOnly}
		if v.State != "ready" || v.Incomplete != nil {
			return nil, fmt.Errorf("volume %s is %s, incomplete %+v", v.Name, v.State, v.Incomplete)
		}
		if o.data, err = r.contents(v.Name); err != nil {
			return nil, err
		}
		snaps, err := r.snapshots(v.Name)
		if err != nil {
			return nil, err
		}
		for _, s := range snaps {
			if s.State != "ready" || s.Temporary || s.Metadata["by"] != "test" && s.Metadata != nil {
				return nil, fmt.Errorf("snapshot %s@%s: %+v", v.Name, s.Name, s)
			}
			data, err := r.contents(v.Name + "@" + s.Name)
			if err != nil {
				return nil, err
			}
			o.snaps = append(o.snaps, observedSnapshot{name: s.Name, id: s.ID, data: data})
		}
		found = append(found, o)
	}
	return found, nil
}

func (r *run) snapshots(name string) (list []control.Snapshot, err error) {
	err = r.ask("snapshots of "+name, func(ctx context.Context, c *control.Client) (err error) {
		list, err = c.Snapshots(ctx, name)
		return err
	})
	return list, err
}

// differences lists the clusters of now that are not those of before.
func differences(before, now []*cell) map[int]bool {
	diff := map[int]bool{}
	for at, c := range now {
		if at < len(before) && c != before[at] || at >= len(before) && c != nil {
			diff[at] = true
		}
	}
	return diff
}

// verifyRest compares what contents don't show: what is mapped, what has changed since
// each snapshot, and what the daemon's own check finds.
func (r *run) verifyRest() error {
	for _, name := range r.m.names() {
		v := r.m.volumes[name]
		if err := r.verifyExtents(v); err != nil || r.w.life.died() {
			return err
		}
		if err := r.check(op{Vol: name}); err != nil || r.w.life.died() {
			return err
		}
	}
	return nil
}

func (r *run) verifyExtents(v *volume) error {
	states := []struct {
		name  string
		cells []*cell
		snaps []*snapshot
	}{{v.name, v.cells, v.snaps}}
	if n := len(v.snaps); n > 0 {
		last := v.snaps[n-1]
		states = append(states, struct {
			name  string
			cells []*cell
			snaps []*snapshot
		}{v.name + "@" + last.name, last.cells, v.snaps[:n-1]})
	}
	for _, s := range states {
		err := r.device(s.name, func(ctx context.Context, dev block.Device) error {
			size := uint64(len(s.cells)) * cluster
			got := extents{}
			err := dev.BlockStatus(ctx, 0, size, got.add)
			if err == nil {
				err = v.compareExtents("mapped", got, differences(nil, s.cells), nil, s.cells)
			}
			for _, since := range s.snaps {
				if err != nil {
					break
				}
				got := extents{}
				if err = dev.(block.Differ).Changes(ctx, since.name, 0, size, got.add); err == nil {
					err = v.compareExtents("changed since "+since.name, got, differences(since.cells, s.cells), since.cells, s.cells)
				}
			}
			return err
		})
		if r.w.life.died() {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// extents collects the clusters that are mapped, or have changed.
type extents map[int]bool

func (e extents) add(x block.Extent) bool {
	if x.Mapped {
		for at := x.Offset / cluster; at*cluster < x.Offset+x.Length; at++ {
			e[int(at)] = true
		}
	}
	return true
}

// compareExtents demands the very clusters, or, where it is not known which cells they
// have, at least those of which the contents differ.
func (v *volume) compareExtents(what string, got extents, want map[int]bool, before, now []*cell) error {
	missing, extra := []int{}, []int{}
	for at := range want {
		var old *cell
		if at < len(before) {
			old = before[at]
		}
		if !got[at] && (!v.fuzzy || *old.versions() != *now[at].versions()) {
			missing = append(missing, at)
		}
	}
	for at := range got {
		if !want[at] && !v.fuzzy {
			extra = append(extra, at)
		}
	}
	if len(missing)+len(extra) == 0 {
		return nil
	}
	slices.Sort(missing)
	slices.Sort(extra)
	return fmt.Errorf("%s: lacks clusters %v, has %v besides", what, missing[:min(20, len(missing))], extra[:min(20, len(extra))])
}

// spaceOf is what the model says that a volume takes, in bytes.
type spaceOf struct {
	live, inherited, snapshots uint64
	alone                      map[uuid.UUID]uint64
}

func (v *volume) space() spaceOf {
	s := spaceOf{alone: map[uuid.UUID]uint64{}}
	live := map[*cell]bool{}
	for _, c := range v.cells {
		if c == nil {
			continue
		}
		s.live += cluster
		live[c] = true
		if c.owner != v.id {
			s.inherited += cluster
		}
	}
	by := map[*cell][]uuid.UUID{}
	for _, snap := range v.snaps {
		s.alone[snap.id] = 0
		for _, c := range snap.cells {
			if c != nil && c.owner == v.id && !live[c] {
				by[c] = append(by[c], snap.id)
			}
		}
	}
	for _, ids := range by {
		s.snapshots += cluster
		if len(ids) == 1 {
			s.alone[ids[0]] += cluster
		}
	}
	return s
}

// space compares what the daemon says that everything takes; what has still to be
// written out or given back is waited for, but not what is wrong otherwise.
func (r *run) space(op) error {
	if err := r.verify(); err != nil || r.w.life.died() {
		return err
	}
	for _, name := range r.m.names() {
		var err error
		for end := time.Now().Add(patience); ; {
			if err = r.compareSpace(r.m.volumes[name]); err == nil || r.w.life.died() {
				break
			}
			if time.Now().After(end) {
				return fmt.Errorf("space of %s: %w", name, err)
			}
			if err := r.tick(op{N: 3600}); err != nil {
				return err
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	return nil
}

func (r *run) compareSpace(v *volume) error {
	snaps, err := r.snapshots(v.name)
	if err != nil {
		return err
	}
	var got control.Space
	err = r.ask("stats", func(ctx context.Context, c *control.Client) error {
		st, err := c.Stats(ctx, v.name)
		got = st.Space
		return err
	})
	if err != nil || v.fuzzy {
		return err
	}
	want := v.space()
	var wrong []string
	note := func(what string, got, want uint64) {
		if got != want {
			wrong = append(wrong, fmt.Sprintf("%s: %d, want %d", what, got, want))
		}
	}
	note("live", got.Live, want.live)
	note("inherited", got.Inherited, want.inherited)
	note("snapshots", got.Snapshots, want.snapshots)
	for _, s := range snaps {
		if s.Alone == nil {
			wrong = append(wrong, "snapshot "+s.Name+" does not say what it holds alone")
			continue
		}
		note("alone in "+s.Name, *s.Alone, want.alone[s.ID])
	}
	if len(wrong) > 0 {
		return errors.New(strings.Join(wrong, "; "))
	}
	return nil
}

// verifyNothing sees that nothing is left when all volumes are deleted: neither on the
// disk nor in the stores nor in the registry. What a storage daemon that was away has
// is collected once an hour, or when that is asked for.
func (r *run) verifyNothing() error {
	const pause, collect = 10 * time.Millisecond, 50
	end := time.Now().Add(patience)
	for i := 1; ; i++ {
		err := r.remains()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("all volumes are deleted: %w", err)
		}
		if i%collect == 0 && !r.w.settings.DirOnly {
			if err := r.ask("collection", func(ctx context.Context, c *control.Client) error {
				_, err := c.StartBackendJob(ctx, "orphans")
				return err
			}); err != nil {
				return err
			}
		}
		if err := r.tick(op{N: 3600}); err != nil {
			return err
		}
		time.Sleep(pause)
	}
}

func (r *run) remains() error {
	var left []string
	for _, dir := range []string{"/data/volumes", "/data/store"} {
		names, err := r.w.fs.List(dir)
		if err != nil {
			return err
		}
		for _, n := range names {
			if !strings.HasPrefix(n, ".") {
				left = append(left, dir+"/"+n)
			}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	kvs, err := r.w.life.reg.List(ctx, "")
	if err != nil {
		return err
	}
	kept := []string{registry.PoolPrefix, registry.NodePrefix, alba.DevicePrefix, alba.PresetPrefix, alba.JobPrefix, alba.RemovedPrefix, alba.ClusterKey, alba.HistoryKey}
	for _, kv := range kvs {
		if !slices.ContainsFunc(kept, func(p string) bool { return strings.HasPrefix(kv.Key, p) }) {
			left = append(left, "key "+kv.Key)
		}
	}
	if !r.w.settings.DirOnly {
		asds, err := r.w.life.client.ASDs(ctx)
		if err != nil {
			return err
		}
		for _, a := range asds {
			if a.Shards > 0 {
				left = append(left, fmt.Sprintf("%d shards on %s", a.Shards, a.Address))
			}
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("left are %d things: %q", len(left), left[:min(3, len(left))])
	}
	return nil
}
