package metamorphic

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"

	"scoria/driver/block"
	"scoria/driver/control"
)

// done carries out what an operation did in the model, unless the daemon has died: then
// rise finds out.
func (r *run) done(change func(*model)) {
	if !r.w.life.died() {
		change(r.m)
	}
}

// refused passes judgement on an operation that the model refuses with these codes.
func (r *run) refused(what string, err error, codes ...control.Code) error {
	if r.w.life.died() {
		return nil
	}
	return expect(what, err, codes...)
}

func (r *run) create(o op) error {
	req := control.CreateVolume{Name: o.Vol, Size: o.N * sector, BlockSize: blockSize(o)}
	made := func(m *model) { m.add(o.Vol, int(o.N/perCluster), uint64(req.BlockSize)/sector) }
	exists := r.m.volumes[o.Vol] != nil
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		_, err := c.CreateVolume(ctx, req)
		return err
	}, made)
	if exists {
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeExists)
	}
	if err == nil {
		r.done(made)
	}
	return err
}

func blockSize(o op) uint32 {
	if o.has("4096") {
		return 4096
	}
	return 512
}

// importVolume makes a volume and writes what it has before it is one.
func (r *run) importVolume(o op) error {
	if r.m.volumes[o.Vol] != nil {
		return nil
	}
	req := control.CreateVolume{Name: o.Vol, Size: o.N * sector, BlockSize: blockSize(o), Import: true}
	n := max(o.N/2/perCluster, 1) * perCluster
	made := func(m *model) {
		v := m.add(o.Vol, int(o.N/perCluster), uint64(req.BlockSize)/sector)
		v.put(v.writing(0, n, o.Seed)...)
		v.settle()
	}
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		if _, err := c.CreateVolume(ctx, req); err != nil {
			return err
		}
		dev, err := r.w.life.host.Devices().Open(ctx, o.Vol)
		if err != nil {
			return err
		}
		err = submit(dev, request(block.OpWrite, 0, n, o.Seed))
		if err == nil {
			err = submit(dev, &block.Request{Op: block.OpFlush})
		}
		block.Release(dev)
		if err == nil {
			_, err = c.Complete(ctx, o.Vol)
		}
		return err
	}, made)
	if err == nil {
		r.done(made)
	}
	return err
}

func (r *run) delete(o op) error {
	v := r.m.volumes[o.Vol]
	gone := func(m *model) { delete(m.volumes, o.Vol) }
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		j, err := c.StartDelete(ctx, o.Vol, o.has("force"))
		_, err = await(ctx, c, j, err)
		return err
	}, gone)
	if v == nil {
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeNotFound)
	}
	sure, perhaps := r.m.dependents(v, noID)
	switch {
	case r.attached[v.name] != nil || sure:
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeInUse)
	case perhaps && control.CodeOf(err) == control.CodeInUse:
		return nil
	case len(v.snaps) > 0 && !o.has("force"):
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeNeedsForce)
	}
	if err == nil {
		r.done(gone)
	}
	return err
}

func (r *run) snapshot(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil {
		return nil
	}
	old, _ := v.find(o.Snap)
	s := &snapshot{name: o.Snap}
	made := func(m *model) {
		v := m.volumes[o.Vol]
		s.cells = slices.Clone(v.cells)
		v.snaps = append(v.snaps, s)
		v.settle()
	}
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		answer, err := c.CreateSnapshot(ctx, v.name, control.CreateSnapshot{Name: o.Snap, Metadata: map[string]string{"by": "test"}})
		if err == nil && !r.w.life.died() {
			s.id = answer.ID
		}
		return err
	}, made)
	if old != nil {
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeExists)
	}
	if err == nil {
		r.done(made)
	}
	return err
}

func (r *run) unsnapshot(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil {
		return nil
	}
	s, i := v.find(o.Snap)
	gone := func(m *model) {
		v := m.volumes[o.Vol]
		v.snaps = slices.Delete(v.snaps, i, i+1)
	}
	if s == nil {
		gone = func(*model) {}
	}
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error { return c.DeleteSnapshot(ctx, v.name, o.Snap) }, gone)
	if s == nil {
		return r.refused(o.Kind, err, control.CodeNotFound)
	}
	sure, perhaps := r.m.dependents(v, s.id)
	switch {
	case sure:
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeInUse)
	case perhaps && control.CodeOf(err) == control.CodeInUse:
		return nil
	}
	if err == nil {
		r.done(gone)
	}
	return err
}

func (r *run) renameSnapshot(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil {
		return nil
	}
	s, i := v.find(o.Snap)
	if s == nil {
		return nil
	}
	taken, _ := v.find(o.To)
	named := func(m *model) {
		other := *s
		other.name, other.made = o.To, cmp.Or(s.made, s.name)
		m.volumes[o.Vol].snaps[i] = &other
	}
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		_, err := c.RenameSnapshot(ctx, v.name, o.Snap, o.To)
		return err
	}, named)
	if taken != nil {
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeExists)
	}
	if err == nil {
		r.done(named)
	}
	return err
}

func (r *run) rollback(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil {
		return nil
	}
	s, i := v.find(o.Snap)
	if s == nil {
		return nil
	}
	back := func(m *model) {
		v := m.volumes[o.Vol]
		v.cells = slices.Clone(s.cells)
		v.snaps = slices.Clone(v.snaps[:i+1])
		v.settle()
	}
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		_, err := c.Rollback(ctx, v.name, o.Snap, o.has("force"))
		return err
	}, back)
	later := v.snaps[i+1:]
	switch {
	case r.attached[v.name] != nil:
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeInUse)
	case len(later) > 0 && !o.has("force"):
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeNeedsForce)
	}
	for _, s := range later {
		if sure, perhaps := r.m.dependents(v, s.id); sure {
			r.alternatives = nil
			return r.refused(o.Kind, err, control.CodeInUse)
		} else if perhaps && control.CodeOf(err) == control.CodeInUse {
			return nil
		}
	}
	if err == nil {
		r.done(back)
	}
	return err
}

func (r *run) cloneVolume(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil || poolOf(o.Vol) != poolOf(o.To) && !r.w.settings.DirOnly {
		return nil
	}
	from := v.name
	var s *snapshot
	if o.Snap != "" {
		if s, _ = v.find(o.Snap); s == nil {
			return nil
		}
		from += "@" + s.name
	} else if v.template && len(v.snaps) > 0 {
		s = v.snaps[len(v.snaps)-1]
	}
	exists := r.m.volumes[o.To] != nil
	req := control.CloneVolume{From: from, Name: o.To}
	if s != nil && o.N > 0 {
		req.Size = uint64(len(s.cells))*cluster + o.N*sector
	}
	made := func(m *model) {
		c := m.add(o.To, len(s.cells), v.block)
		c.cells = slices.Clone(s.cells)
		c.resize(int(max(req.Size/cluster, uint64(len(s.cells)))))
		c.kin = append(slices.Clone(v.kin), kinship{volume: v.id, snapshot: s.id})
		c.fuzzy = v.fuzzy
		c.settle()
	}
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		_, err := c.CloneVolume(ctx, req)
		return err
	}, made)
	switch {
	case s == nil && v.template:
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeNotFound)
	case s == nil:
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeInvalid)
	case exists:
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeExists)
	}
	if err == nil {
		r.done(made)
	}
	return err
}

func (r *run) flatten(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil || v.template || v.readOnly {
		return nil
	}
	flat := func(m *model) {
		v := m.volumes[o.Vol]
		moved := step{} // no flush
		for at, c := range v.cells {
			if c != nil && c.owner != v.id {
				moved[at] = &cell{owner: v.id, now: c.now}
			}
		}
		if len(moved) > 0 {
			v.put(moved)
			v.ack()
		}
		if len(v.snaps) == 0 {
			v.independent()
		}
		for i := range v.kin {
			v.kin[i].maybe = true
		}
	}
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		j, err := c.StartFlatten(ctx, v.name)
		_, err = await(ctx, c, j, err)
		return err
	}, func(m *model) {})
	perhaps := !slices.ContainsFunc(v.kin, func(k kinship) bool { return !k.maybe && v.reads(k.volume) })
	switch {
	case len(v.kin) == 0:
		return r.refused(o.Kind, err, control.CodeInvalid)
	case r.w.life.died():
		// How far it came is not known, nor whether the kinship was recorded.
		v.fuzzy = true
		for i := range v.kin {
			v.kin[i].maybe = true
		}
		return nil
	case perhaps && control.CodeOf(err) == control.CodeInvalid:
		v.independent()
		return nil
	}
	if err == nil {
		r.done(flat)
	}
	return err
}

func (r *run) resize(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil {
		return nil
	}
	n := int(o.N / perCluster)
	smaller := n < len(v.cells)
	to := func(m *model) {
		v := m.volumes[o.Vol]
		v.resize(n)
		if smaller { // with a checkpoint
			v.settle()
		}
	}
	alternatives := []func(*model){to}
	if smaller && o.has("force") {
		// What lies behind goes before the size does.
		alternatives = append(alternatives, func(m *model) {
			v := m.volumes[o.Vol]
			v.put(v.clearing(o.N, v.sectors()-o.N)...)
		})
	}
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		_, err := c.ResizeVolume(ctx, v.name, o.N*sector, o.has("force"))
		return err
	}, alternatives...)
	if smaller && !o.has("force") {
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeNeedsForce)
	}
	if err == nil {
		r.done(to)
	}
	return err
}

// template makes a volume a template, with a snapshot, or an ordinary one again.
func (r *run) template(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil || v.readOnly {
		return nil
	}
	want := o.To == "on"
	s := &snapshot{name: "template"}
	for i := 2; slices.ContainsFunc(v.snaps, func(has *snapshot) bool { return has.name == s.name }); i++ {
		s.name = fmt.Sprint("template-", i)
	}
	kept := func(m *model) {
		if want && !v.template {
			v := m.volumes[o.Vol]
			s.cells = slices.Clone(v.cells)
			v.snaps = append(v.snaps, s)
			v.settle()
		}
	}
	changed := func(m *model) {
		kept(m)
		m.volumes[o.Vol].template = want
	}
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		_, err := c.SetTemplate(ctx, v.name, want)
		if err == nil && want && !v.template {
			var answer control.Snapshot
			answer, err = c.Snapshot(ctx, v.name, s.name)
			s.id = answer.ID
		}
		return err
	}, changed, kept)
	if v.template != want && r.attached[v.name] != nil {
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeInUse)
	}
	if err == nil {
		r.done(changed)
	}
	return err
}

func (r *run) setReadOnly(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil || v.template {
		return nil
	}
	want := o.To == "on"
	changed := func(m *model) {
		v := m.volumes[o.Vol]
		if v.readOnly != want {
			v.readOnly = want
		}
	}
	err := r.manage(o.Kind, func(ctx context.Context, c *control.Client) error {
		_, err := c.SetVolume(ctx, v.name, control.SetVolume{ReadOnly: &want})
		return err
	}, changed)
	_, perhaps := r.m.dependents(v, noID)
	switch {
	case r.attached[v.name] != nil:
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeInUse)
	case perhaps && control.CodeOf(err) == control.CodeInUse:
		return nil
	}
	if err == nil {
		r.done(changed)
	}
	return err
}

// export returns the stream of a snapshot.
func (r *run) export(e control.Export) ([]byte, error) {
	var b bytes.Buffer
	err := r.ask("export", func(ctx context.Context, c *control.Client) error { return c.Export(ctx, e, &b) })
	return b.Bytes(), err
}

func (r *run) receive(to string, p []byte, alternatives ...func(*model)) error {
	return r.manage("receive", func(ctx context.Context, c *control.Client) error {
		_, err := c.Receive(ctx, to, false, bytes.NewReader(p))
		return err
	}, alternatives...)
}

// copyVolume exports a snapshot and receives it as a new volume.
func (r *run) copyVolume(o op) error {
	v := r.m.volumes[o.Vol]
	if v == nil {
		return nil
	}
	s, _ := v.find(o.Snap)
	if s == nil {
		return nil
	}
	p, err := r.export(control.Export{Volume: v.name, Snapshot: s.name})
	if err != nil || r.w.life.died() {
		return err
	}
	exists := r.m.volumes[o.To] != nil
	made := func(m *model) {
		c := m.add(o.To, len(s.cells), v.block)
		for at, from := range s.cells {
			if from != nil {
				c.cells[at] = &cell{owner: c.id, now: from.now}
			}
		}
		c.snaps = []*snapshot{{name: s.name, id: s.id, cells: slices.Clone(c.cells)}}
		c.fuzzy = v.fuzzy
		c.settle()
	}
	err = r.receive(o.To, p, made)
	if exists {
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeExists)
	}
	if err == nil {
		r.done(made)
	}
	return err
}

// increment exports what has changed since the newest snapshot of another volume, and
// receives it there.
func (r *run) increment(o op) error {
	v, to := r.m.volumes[o.Vol], r.m.volumes[o.To]
	if v == nil || to == nil || len(to.snaps) == 0 || to.template || to.readOnly || v.block != to.block {
		return nil
	}
	s, upTo := v.find(o.Snap)
	base := to.snaps[len(to.snaps)-1]
	since := slices.IndexFunc(v.snaps, func(has *snapshot) bool { return has.id == base.id })
	if s == nil || since < 0 || since >= upTo {
		return nil
	}
	from := v.snaps[since]
	p, err := r.export(control.Export{Volume: v.name, Snapshot: s.name, Since: from.name})
	if err != nil || r.w.life.died() {
		return err
	}
	brought := func(m *model) {
		to := m.volumes[o.To]
		to.resize(len(s.cells))
		for at, c := range s.cells {
			switch {
			case at < len(from.cells) && c == from.cells[at]:
			case c == nil:
				to.cells[at] = nil
			default:
				to.cells[at] = &cell{owner: to.id, now: c.now}
			}
		}
		to.snaps = append(to.snaps, &snapshot{name: s.name, id: s.id, cells: slices.Clone(to.cells)})
		to.fuzzy = to.fuzzy || v.fuzzy
		to.settle()
	}
	has := slices.ContainsFunc(to.snaps, func(has *snapshot) bool { return has.id == s.id || has.name == s.name })
	changed := len(differences(base.cells, to.cells)) > 0 || len(base.cells) != len(to.cells)
	err = r.receive(to.name, p, brought)
	switch {
	case has:
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeExists)
	case changed && to.fuzzy && err == nil: // not known, then
	case to.fuzzy && control.CodeOf(err) == control.CodeInvalid:
		r.alternatives = nil
		return nil
	case changed:
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeInvalid)
	case r.attached[to.name] != nil:
		r.alternatives = nil
		return r.refused(o.Kind, err, control.CodeInUse)
	}
	if err == nil {
		r.done(brought)
	}
	return err
}
