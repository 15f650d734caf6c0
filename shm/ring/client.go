package ring

import "sync/atomic"

// Client is the client's side of a ring. Add, Publish and Reset belong to one
// goroutine at a time, Poll and EnableCall to one, which may be another.
type Client struct {
	view
	mask    uint32
	entries int
	layout  Layout
	mem     []byte

	added, shown uint32 // entries
	polled       uint32 // completions read
}

// NewClient makes the client's side over a ring's whole memory. It fails with
// ErrHeader or ErrMemory.
func NewClient(mem []byte) (*Client, error) {
	l, err := ParseHeader(mem)
	if err != nil {
		return nil, err
	}
	v, err := newView(mem, l)
	if err != nil {
		return nil, err
	}
	return &Client{view: v, mask: uint32(l.Entries - 1), entries: l.Entries, layout: l, mem: mem}, nil
}

// Layout returns where the parts are.
func (c *Client) Layout() Layout { return c.layout }

// Arena returns the data arena.
func (c *Client) Arena() []byte { return c.mem[c.layout.ArenaOffset():c.layout.TotalBytes()] }

// Add writes an entry, which the server sees after the next Publish. The caller
// sees to it that there are at most as many requests under way as entries.
func (c *Client) Add(r Request) {
	i := c.added & c.mask
	c.storeSubmit(i, &r)
	if c.added != c.shown {
		c.setSubmit(i, c.added+1)
	}
	c.added++
}

// Publish shows the server what was added. It reports whether the server is to
// be kicked.
func (c *Client) Publish() (kick bool) {
	if c.added == c.shown {
		return false
	}
	c.publishSubmit(c.shown&c.mask, c.shown+1)
	c.shown = c.added
	return atomic.LoadUint32(c.kickFlag) != 0 && atomic.SwapUint32(c.kickFlag, 0) != 0
}

// Poll returns the next completion, if there is one.
func (c *Client) Poll() (Completion, bool) {
	done, seq := c.loadCompletion(c.polled & c.mask)
	if seq != c.polled+1 {
		return Completion{}, false
	}
	c.polled++
	return done, true
}

// EnableCall asks the server for a call at the next completion. It reports
// whether one came meanwhile, for which there may be no call.
func (c *Client) EnableCall() bool {
	atomic.SwapUint32(c.callFlag, 1)
	_, seq := c.loadCompletion(c.polled & c.mask)
	return seq == c.polled+1
}

// DisableCall takes the wish for a call back.
func (c *Client) DisableCall() {
	if atomic.LoadUint32(c.callFlag) != 0 {
		atomic.StoreUint32(c.callFlag, 0)
	}
}

// Reset empties both rings, for a new server. No server has the memory.
func (c *Client) Reset() {
	clear(c.mem[c.layout.SubmitOffset() : c.layout.CompletionOffset()+uint64(c.entries)*CompletionBytes])
	atomic.StoreUint32(c.kickFlag, 0)
	atomic.StoreUint32(c.callFlag, 0)
	c.added, c.shown, c.polled = 0, 0, 0
}
