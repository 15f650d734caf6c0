package proxy

import "time"

// SetWriteTimeout sets how long one Apply of an upload may take. It is called before the
// proxy is used.
func SetWriteTimeout(p *Proxy, d time.Duration) { p.writeTimeout = d }
